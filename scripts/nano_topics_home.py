"""What the pre-training text says about the house: clocks, cooking, lights, heating, chores, shopping."""

from nano_topic import Topic, lines, pairs

HOME: dict[str, Topic] = {
    "clock": Topic(lines("""
        {name#a} gets up at {time#a} every day.
        The alarm clock of {name#a} rings at {time#a}.
        The display shows {time#a!clock}, and {name#a} calls it {time#a!words}.
        {time#a!words} is written {time#a!clock}.
        The first bell is at {time#a}, that is {time#a!clock}, and the second at {time#b}, that is {time#b!clock}.
        On {weekday#a} {name#a} wanted to sleep until {time#a}, but the phone rang at {time#b}.
        The note on the door says "{time#a!clock}", so be there at {time#a!words}.
        {name#b} came at {time#b!clock}, which is {time#b!words}.
        At {time#a} it was still quiet in the house; the clock said {time#a!clock}.
        "{time#a!clock}," said {name#b}, "so it is {time#a!words}."
        {name#a} went to bed at {time#b} and got up at {time#a}.
        It is {time#b} now ({time#b!clock}), and the shop opens at {time#a} ({time#a!clock}).
        """), pairs("""
        When do you get up {day#a}? | At {time#a}. My clock is set to {time#a!clock}.
        Could you wake me at {time#a}? | Of course, I will knock at {time#a!clock}.
        What time is it? | It is {time#a!words}. The clock says {time#a!clock}.
        Is {time#b!clock} too early for you? | No, {time#b!words} is fine.
        I want to sleep longer {day#a}. | Then set your alarm for {time#b}, not for {time#a}.
        Did the alarm go off at {time#a}? | Yes, at {time#a!clock}, and nobody heard it.
        ~wake me at {time#a} | All right, at {time#a!clock}.
        ~wake {name#c} up at {time#b} {day#a} | Sure, {time#b!words}, I wrote it down.
        ~set the alarm clock to {time#a} | It is set to {time#a!clock} now.
        """), lines("""
        {"clock":"{room#a}","shows":"{time#a!clock}","owner":"{name#a}"}
        {"bells":["{time#a!clock}","{time#b!clock}"],"weekday":"{day#a!key}"}
        {"person":"{name#a}","gets_up":"{time#a!clock}","goes_to_bed":"{time#b!clock}"}
        """)),
    "cooking": Topic(lines("""
        The {label#a} takes {duration#a}, that is {duration#a!minutes} minutes.
        {duration#a!words} is {duration#a!minutes} minutes.
        {name#a} put the {label#a} on and waited {duration#a}.
        After {duration#b} the timer for the {label#a} went off.
        The timer said {duration#a!minutes}, because the {label#a} needs {duration#a!words}.
        {name#b} thinks that {duration#b} is too long for the {label#a}; {name#a} always takes {duration#a}.
        On the box it says "{duration#a!minutes} minutes", which is {duration#a!words}.
        In {duration#a} the {label#a} will be done, in {duration#b} the {label#b}.
        {name#a} had {duration#a} for the {label#b} and needed {duration#b}.
        The recipe wants {item#a}, {item#b} and {duration#b} ({duration#b!minutes} minutes) of patience.
        Count down {duration#a} and you end at zero after {duration#a!minutes} minutes.
        Baking is patience, not action, says {name#b}, and puts the {label#b} in for {duration#b}.
        """), pairs("""
        How long does the {label#a} need? | About {duration#a}, so {duration#a!minutes} minutes.
        Can you set the timer? | Yes, I put {duration#a!minutes} minutes on it, {duration#a!words}.
        Is {duration#b} enough for the {label#b}? | It should be: {duration#b!minutes} minutes is what the book says.
        Let me know when the {label#a} is done. | I will, in {duration#a}.
        I need a timer for the {label#b}. | There is one in the {room#a}, it runs for {duration#b}.
        ~set the timer for the {label#a} | Okay, {duration#a}, I put {duration#a!minutes} on it.
        ~give the {label#b} {duration#b} | All right, {duration#b!minutes} minutes.
        ~start with the {label#a} and count to {number#a} | Okay, I will start now.
        """), lines("""
        {"dish":"{label#a}","cooking_minutes":{duration#a!minutes},"cook":"{name#a}"}
        {"recipe":"{label#a}","needs":["{item#a}","{item#b}"],"minutes":{duration#b!minutes}}
        {"label":"{label#a}","minutes":[{duration#a!minutes},{duration#b!minutes}]}
        """)),
    "lights": Topic(lines("""
        The light in the {room#a} is on, the light in the {room#b} is off.
        {name#a} turned off the light in the {room#a} at {time#a}.
        {name#b} switched the {room#b} light on, because it was dark in the {room#b}.
        Nobody was in the {room#a}, but the lights were on all day.
        The lamp in the {room#a} has a brightness of {percent#a} percent; the switch shows {percent#a!digits}%.
        {percent#a!words} percent is {percent#a!digits}%.
        {name#a} likes {color#a} light in the {room#a} and {color#b} light in the {room#b}.
        In the {room#b} the light was dimmed to {percent#b} percent.
        The {room#a} is bright at {percent#a!digits}%, the {room#b} at {percent#b!digits}%.
        {name#b} made the {room#b} light {color#b} for the party.
        The lamp was {color#a} first, then {color#b}.
        It was dark in the {room#a} until {name#a} lit a candle.
        """), pairs("""
        Is the light in the {room#a} still on? | No, I turned it off at {time#a!clock}.
        Could you turn on the light in the {room#b}? | It is on already, at {percent#b!digits}%.
        It is too dark in the {room#a}. | Then put the light at {percent#a} percent.
        What color is the lamp in the {room#a}? | It is {color#a}, and in the {room#b} it is {color#b}.
        Who switched the {room#b} lights off? | {name#a} did, nobody was there.
        How bright is it in the {room#a}? | {percent#a!words} percent, the switch says {percent#a!digits}.
        ~turn off the light in the {room#a} | It is off now.
        ~dim the light in the {room#b} to {percent#b} percent | Okay, {percent#b!digits}%.
        ~make it brighter in the {room#a}, {percent#a} would be enough | Done, it is at {percent#a!digits}.
        ~switch to {color#a} light | Would you not like {color#b} light?
        """), lines("""
        {"lamp":"{room#a}","on":true,"percent":{percent#a!digits}}
        {"lamp":"{room#b}","on":false,"colors":["{color#a}","{color#b}"]}
        {"room":"{room#a}","lamps":{small#a!digits},"brightness":{percent#a!digits},"color":"{color#a}"}
        {"switches":[{"room":"{room#a}","state":"on"},{"room":"{room#b}","state":"off"}]}
        """)),
    "heating": Topic(lines("""
        It was {degrees#a} degrees in the {room#a} and {degrees#b} in the {room#b}.
        The thermostat in the {room#a} shows {degrees#a!digits}; {name#a} reads {degrees#a!words} degrees.
        {degrees#a!words} degrees is written {degrees#a!digits}.
        {name#a} wants {degrees#a} degrees in the {room#a}, {name#b} only {degrees#b}.
        At {time#a} the heating in the {room#b} starts, and at {time#b} it is {degrees#b} degrees there.
        The {room#b} should not be warmer than {degrees#b!words} degrees.
        {name#b} set the thermostat in the {room#b} to {degrees#b} and went to sleep.
        {degrees#a!digits} degrees is warm for a {room#a}.
        """), pairs("""
        How warm is it in the {room#a}? | {degrees#a!words} degrees, the thermostat says {degrees#a!digits}.
        Could you heat the {room#b} a little? | I set it to {degrees#b} degrees.
        I am cold in the {room#a}. | It should be {degrees#a} degrees there.
        Is {degrees#b!digits} degrees right for the {room#b}? | Make it {degrees#a!words}.
        ~heat the {room#a} to {degrees#a} degrees | Sure, {degrees#a!digits} degrees.
        ~set the thermostat to {degrees#b} | It is at {degrees#b!digits} already.
        ~check the heating in the {room#b} | It says {degrees#b!words}.
        """), lines("""
        {"thermostat":"{room#a}","degrees":{degrees#a!digits}}
        {"heating":[{"room":"{room#a}","degrees":{degrees#a!digits}},{"room":"{room#b}","degrees":{degrees#b!digits}}]}
        {"night":{degrees#b!digits},"day":{degrees#a!digits},"room":"{room#b}"}
        """)),
    "chores": Topic(lines("""
        {name#a} has to {chore#a} {day#a}.
        {name#b} forgot to {chore#b}, so {name#a} did it at {time#a}.
        The note on the fridge says "{chore#a}".
        First {name#a} wants to {chore#a}, then to {chore#b}.
        "{chore#a}" and "{chore#b}" are still on the list of {name#b}.
        It takes {duration#a} to {chore#a} and {duration#b} to {chore#b}.
        {name#b} must not forget to {chore#b} {day#b}.
        At {time#a!clock} it is time to {chore#a}, at {time#b!clock} to {chore#b}.
        Nobody likes to {chore#b}, not even {name#c}.
        {name#a} set a reminder to {chore#a}, and another reminder to {chore#b} at {time#a}.
        """), pairs("""
        What do we have to do {day#a}? | We have to {chore#a} and to {chore#b}.
        Did you {chore#a}? | Not yet, I will do it at {time#a}.
        Remind me that we have to {chore#b}. | I wrote "{chore#b}" on the note.
        Who wants to {chore#b}? | {name#c} does, {day#b}.
        Don't forget to {chore#a}! | I will {chore#a} at {time#b!clock}.
        ~remind me to {chore#a} | I will remind you {day#a}.
        ~{chore#b}, it is {time#a} already | Yes, it is {time#a!clock}, I will {chore#b} now.
        ~{chore#a} before {name#c} comes | All right, when does {name#c} come?
        """), lines("""
        {"chores":["{chore#a}","{chore#b}"],"who":"{name#a}"}
        {"note":"{chore#a}","due":"{day#a!key}"}
        {"done":["{chore#b}"],"open":["{chore#a}"],"weekday":"{day#b!key}"}
        {"text":"{chore#b}","who":"{name#b}","hour":"{time#a!clock}"}
        {"reminder":"{chore#a}","{day#a!key}":"{time#b!clock}"}
        """)),
    "shopping": Topic(lines("""
        {name#a} bought {goods#a} and forgot {item#a}.
        Shopping list of {name#b}: {goods#a!commas}.
        On the list are "{item#a}" and "{item#b}".
        {name#a} is out of {goods#b}, and there is no more {item#b} at home.
        The store had {item#a} and {goods#b}, but no {goods#a}.
        {name#b} put {goods#a} in the bag and paid {number#a} euros.
        We need {goods#b}, wrote {name#c}, and added {item#c}.
        {item#a} costs {number#a!digits} euros, {item#b} {number#b!digits}: {number#a!words} and {number#b!words}.
        In the {room#a} there are {goods#a}.
        In the bag: {goods#b!commas}.
        """), pairs("""
        What did you buy? | I bought {goods#a}.
        Do we need {item#a}? | Yes, and {goods#b}.
        What is on the shopping list? | Only {goods#a}.
        Are we out of {item#b}? | There is {item#b} in the {room#a}.
        What does {item#a} cost? | {number#a!words} euros, so {number#a!digits}.
        ~buy {goods#a} | Okay, I will get {goods#a}.
        ~add {item#a} to the list | It says {item#a} now, and {item#b}.
        ~write down that we need {goods#b} | I wrote down "{goods#b!commas}".
        ~put the {item#b} in the {room#a} | There is some {item#b} there already.
        """), lines("""
        {"goods":["{item#a}","{item#b}","{item#c}"],"buyer":"{name#a}"}
        {"prices":{"{item#a}":{number#a!digits},"{item#b}":{number#b!digits}}}
        {"bag":["{item#a}"],"missing":["{item#b}"],"paid":{number#a!digits}}
        {"shelf":"{room#a}","items":["{item#c}","{item#a}"]}
        """)),
}  # fmt: skip
