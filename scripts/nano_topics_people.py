"""What the pre-training text says about people: messages, calls, appointments, music, weather, journeys."""

from nano_topic import Topic, lines, pairs

PEOPLE: dict[str, Topic] = {
    "messages": Topic(lines("""
        {name#a} wrote to {name#b}: "{statement#a}".
        {name#b} read the message "{statement#a}" and answered "{wish#b}".
        {name#a} told {name#b} that {statement#a}.
        {name#b} says that {statement#b}.
        On the phone {name#a} heard that {statement#b}.
        The letter from {name#a} began with "{wish#a}" and ended with "{wish#b}".
        "{wish#b}" was all that {name#b} wrote.
        Everybody knows that {statement#a}, only {name#c} does not.
        {name#c} got a message at {time#a} saying "{statement#a}".
        At {time#a!clock} {name#a} sent {name#c} the words "{wish#b}".
        """), pairs("""
        What did {name#c} write? | "{statement#a}", that is all.
        Did you tell {name#c} that {statement#a}? | Yes, I wrote "{statement#a}".
        Let {name#c} know that {statement#b}. | All right, I will write "{statement#b}".
        Any news from {name#c}? | {name#c} says that {statement#a}.
        Did you get my message? | The one that says "{wish#b}"? Yes.
        ~tell {name#c} that {statement#a} | I told {name#c}: "{statement#a}".
        ~send {name#d} a message, {name#d} is waiting | What should I text {name#d}? Just "{wish#b}"?
        ~write "{wish#a}" on the card | All right, "{wish#a}".
        ~text {name#d}: {wish#b} | Okay, I sent "{wish#b}" to {name#d}.
        """), lines("""
        {"sender":"{name#a}","reader":"{name#b}","body":"{statement#a}"}
        {"inbox":[{"sender":"{name#b}","body":"{statement#a}"},{"sender":"{name#c}","body":"{wish#b}"}]}
        {"text":"{statement#b}","sent":"{time#a!clock}","sender":"{name#a}"}
        """)),
    "calls": Topic(lines("""
        {name#a} called {name#b} at {time#a} and talked for {duration#a}.
        {name#b} does not like to talk on the phone, {name#a} does.
        The number of {name#a} ends in {number#a!digits}, the number of {name#b} in {number#b!digits}.
        {number#a!words} is written {number#a!digits}, and {number#b!words} is {number#b!digits}.
        {name#c} gave {name#a} a call, but {name#a} was with {name#b}.
        "{name#a}?" asked {name#b}. "No, it is {name#c}."
        At {time#b!clock} the phone rang again: {name#c} wanted to speak with {name#b}.
        In the phone book {name#a} comes before {name#b}, and {name#c} is missing.
        {name#a} is {number#a} years old, {name#b} is {number#b}.
        """), pairs("""
        Who rang at {time#a}? | It was {name#c}, and at {time#b} it was {name#d}.
        Did you phone {name#c}? | No, I want to call {name#c} at {time#a}.
        I need to speak with {name#d}. | {name#d} is out; call at {time#b}.
        How old is {name#c}? | {number#a!words}, so {number#a!digits}.
        Get {name#c} on the phone! | {name#c} is not there, only {name#d}.
        ~call {name#c} at {time#a} | Okay, at {time#a!clock}.
        ~give {name#d} a call now | {name#d} is on the phone with {name#c}.
        ~phone {name#c} for me | Yes, I want to talk to {name#c} too.
        """), lines("""
        {"contacts":["{name#a}","{name#b}","{name#c}"]}
        {"name":"{name#a}","age":{number#a!digits},"friend":"{name#b}"}
        {"caller":"{name#c}","at":"{time#a!clock}","lasted":{duration#a!minutes}}
        """)),
    "calendar": Topic(lines("""
        {name#a} has a {event#a} {day#a} at {time#a}.
        The {event#a} with {name#b} is {day#a} at {time#a} ({time#a!clock}).
        The calendar says "{event#a}, {day#a!bare}, {time#a!clock}".
        {name#b} cannot come to the {event#b} {day#b}.
        There are {small#a} people at the {event#a} and {small#b} at the {event#b}.
        {weekday#a} is the day of the {event#a}, {weekday#b} of the {event#b}.
        The {event#b} begins at {time#b}, so {name#a} leaves at {time#a}.
        {name#c} plans the {event#b} with {name#a} for {day#b!bare}.
        After the {event#a} {name#a} and {name#b} go to the {event#b}.
        The {event#a} lasted {duration#a}, that is {duration#a!minutes} minutes.
        Every event this week: {event#a} ({day#a!bare}), {event#b} ({day#b!bare}).
        """), pairs("""
        When is the {event#a}? | It is {day#a} at {time#a}.
        Do you have time {day#a}? | No, I have a {event#a} with {name#c} at {time#a!clock}.
        Is the {event#b} in your calendar? | Yes, {day#b} at {time#b!clock}, {time#b!words}.
        Who comes to the {event#a}? | {name#c} and {name#d}.
        Put the {event#b} in the calendar. | It is there: {event#b}, {day#b!bare}.
        ~note down the {event#a} {day#a} at {time#a} | Okay, {event#a}, {time#a!clock}.
        ~plan something for {day#b!bare} | I could schedule the {event#b} then.
        ~add the {event#b} with {name#c} | Done, {event#b} with {name#c}.
        """), lines("""
        {"calendar":[{"what":"{event#a}","when":"{day#a!key}","begins":"{time#a!clock}"}]}
        {"{day#a!key}":["{event#a}"],"{day#b!key}":["{event#b}"]}
        {"title":"{event#b}","guests":["{name#a}","{name#b}"],"begins":"{time#b!clock}"}
        {"week":["{day#a!key}","{day#b!key}"],"owner":"{name#a}"}
        """)),
    "music": Topic(lines("""
        {name#a} listens to {band#a} in the {room#a}.
        {band#a} and {band#b} play {genre#a}.
        The radio in the {room#b} plays {genre#a}, {name#b} wants to hear {genre#b}.
        {name#b} knows every song by {band#a}, but nothing by {band#b}.
        The volume was at {percent#a} percent ({percent#a!digits}%), too loud for {name#b}.
        "{band#b}" stands on the ticket of {name#a}.
        Some {genre#b} at {percent#b!digits}% would be nice, thought {name#a}.
        The concert of {band#a} begins at {time#a}, {time#a!clock}, in {city#a}.
        First they played {genre#a}, then {genre#b}, and all day it was loud in the {room#a}.
        {name#a} likes the artist, {name#b} likes the genre: {band#a} and {genre#a}.
        After an action film {name#b} hears {genre#b} at a low level, {percent#b} percent.
        """), pairs("""
        What music do you like? | I like {genre#a}, and {name#c} likes {genre#b}.
        Who plays in {city#a} {day#a}? | {band#a}, at {time#a!clock}.
        Could you turn the music down in the {room#a}? | It is at {percent#a} percent, I will make it {percent#b!digits}.
        Do you know {band#b}? | No, but I know {band#a}.
        Is that {genre#a}? | No, that is {genre#b} by {band#b}.
        ~play something by {band#a} | I will put on {band#a} in the {room#a}.
        ~play some {genre#b} | In the {room#b} they play {genre#b} already.
        ~set the volume to {percent#b} percent | Okay, {percent#b!digits}.
        """), lines("""
        {"band":"{band#a}","style":"{genre#a}","fans":{number#a!digits}}
        {"records":["{band#a}","{band#b}"],"owner":"{name#a}"}
        {"radio":"{room#b}","plays":"{genre#b}","loudness":{percent#a!digits}}
        {"styles":["{genre#a}","{genre#b}"],"room":"{room#a}"}
        {"artist":"{band#a}","city":"{city#a}","genre":"{genre#b}"}
        """)),
    "weather": Topic(lines("""
        It rained in {city#a} all day, and in {city#b} the sun was out.
        {day#a!bare} will be warm in {city#a}: {degrees#a} degrees ({degrees#a!digits}).
        {name#a} needs an umbrella in {city#b} {day#b}.
        The weather in {city#a} was cold on {weekday#a}, wrote {name#b}.
        In {city#b} it will be {degrees#b!words} degrees {day#a}, so take {degrees#b!digits} as a guide.
        {city#a} is colder than {city#b}, says {name#c}.
        "{city#a}" and "{city#b}" are on the weather map.
        No city is warmer {day#b} than {city#a}: {degrees#a!words} degrees.
        """), pairs("""
        Will it rain in {city#a} {day#a}? | Yes, but not in {city#b}.
        How cold will it be in {city#b}? | About {degrees#b} degrees {day#b}.
        What is the weather like in {city#a}? | It is nice, {degrees#a!words} degrees.
        Do I need an umbrella {day#a}? | In {city#b} you do.
        ~tell me the weather in {city#a} | {degrees#a!words} degrees, {degrees#a!digits}, and no rain.
        ~check what the weather will be like {day#b} | It will rain in {city#b}.
        """), lines("""
        {"weather":{"{city#a}":"rain","{city#b}":"sun"},"weekday":"{day#a!key}"}
        {"place":"{city#a}","degrees":{degrees#a!digits},"report":"{day#b!key}"}
        {"cities":["{city#a}","{city#b}"],"warmer":"{city#b}"}
        {"city":"{city#b}","high":{degrees#a!digits},"level":{small#a!digits}}
        """)),
    "trains": Topic(lines("""
        {name#a} takes the train from {city#a} to {city#b} {day#a}.
        The train leaves {city#a} at {time#a} ({time#a!clock}) and is in {city#b} at {time#b} ({time#b!clock}).
        From {city#b} {name#a} went on to {city#c}.
        The ticket says "{city#a}" to "{city#b}", {day#a!bare}, {time#a!clock}.
        It is {duration#a} from {city#b} to {city#c}, {duration#a!minutes} minutes.
        {name#b} lives in {city#c} and works in {city#a}.
        There is no train to {city#c} {day#b}, so {name#b} leaves {city#b} at {time#b}.
        Platform {small#a!digits}, said the voice, platform {small#a!words}.
        {name#c} has to go to {city#b} {day#a} at {time#b!words}, {time#b!clock}.
        """), pairs("""
        Which train goes to {city#b}? | The one at {time#a}, from {city#a}.
        When do you leave {city#a}? | {day#a!bare} at {time#a!clock}, that is {time#a!words}.
        Where does {name#c} live? | In {city#c}, not in {city#a}.
        Is there a train from {city#a} to {city#c}? | Yes, at {time#b!clock}, {time#b!words}.
        How long is it to {city#b}? | It is {duration#a}, {duration#a!minutes} minutes.
        ~find a train to {city#b} | There is one from {city#a} {day#a} at {time#a}.
        ~look up when we have to leave | We leave {city#a} at {time#a!words}, {time#a!clock}.
        ~get the tickets to {city#c}, leaving {day#b} | From {city#b} or from {city#a}?
        """), lines("""
        {"train":{"start":"{city#a}","goal":"{city#b}","leaves":"{time#a!clock}"}}
        {"stops":["{city#a}","{city#b}","{city#c}"],"weekday":"{day#a!key}"}
        {"passenger":"{name#a}","home":"{city#c}","ticket":"{city#b}","platform":{small#a!digits}}
        {"leaves":"{time#a!clock}","arrives":"{time#b!clock}","goal":"{city#b}"}
        """)),
}  # fmt: skip
