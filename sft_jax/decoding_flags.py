"""Flags that say how answers are drawn, the same ones for every command that gives answers."""

from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

if TYPE_CHECKING:
    from sft_jax.evaluation.sampling import Sampling


class DecodingFlags(NamedTuple):
    """The flags once they are defined."""

    sampling: dict[str, flags.FlagHolder[Any]]  # by name, in the order of arguments of `sampling`
    stop: flags.FlagHolder[list[str]]
    seed: flags.FlagHolder[int]

    @property
    def named(self) -> dict[str, flags.FlagHolder[Any]]:
        """The flags that change nothing where nothing is answered, as they are written."""
        return {f"--{name}": holder for name, holder in {**self.sampling, "stop": self.stop}.items()}

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return tuple(self.stop.value)

    @property
    def given(self) -> dict[str, Any]:
        """The values of options of sampling that are on the command line, by name; the seed is one of them."""
        return {name: holder.value for name, holder in {**self.sampling, "seed": self.seed}.items() if holder.present}

    def checked(self) -> "Sampling":
        """Returns the sampling options; raises UserError for values that are out of range, before anything is loaded."""
        from sft_jax.evaluation.sampling import sampling
        from sft_jax.evaluation.text import StopStrings

        StopStrings(None, self.texts)
        return sampling(**{name: holder.value for name, holder in self.sampling.items()})


def define_decoding_flags(seed_help: str) -> DecodingFlags:
    """Defines --temperature, --top_k, --top_p, --min_p, --repetition_penalty, --stop and --seed."""
    sampling = {
        "temperature": flags.DEFINE_float("temperature", 0.0, "0 is greedy."),
        "top_k": flags.DEFINE_integer("top_k", 0, "Draw from the k most probable tokens; 0 = all."),
        "top_p": flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens whose probabilities reach p; 1 = all."),
        "min_p": flags.DEFINE_float("min_p", 0.0, "Draw from tokens at least so many times as probable as the most probable one; 0 = all."),
        "repetition_penalty": flags.DEFINE_float("repetition_penalty", 1.0, "Above 1, tokens that are there already are less probable."),
    }
    stop = flags.DEFINE_multi_string("stop", [], "A text that ends an answer; several times.")
    return DecodingFlags(sampling, stop, flags.DEFINE_integer("seed", 0, seed_help))
