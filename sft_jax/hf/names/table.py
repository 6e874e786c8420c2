"""The table of names of one architecture, and where in a checkpoint its tensors are found."""

import dataclasses
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sft_jax.errors import UserError
from sft_jax.hf.rules import Rule
from sft_jax.model.spec import DecoderSpec

# A buffer of older exports, which config.json determines.
INVERSE_FREQUENCIES = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"


@dataclass(frozen=True)
class Root:
    """Where in a checkpoint a decoder is: what is written before the names of its body, and the name of its head."""

    body: str
    head: str


@dataclass(frozen=True)
class NameTable:
    """The names of one architecture. Those of the body, its embedding and its buffers are relative to the root."""

    body: Callable[[DecoderSpec], list[Rule]]  # everything but the head, in the order in which it is written
    roots: tuple[Root, ...] = (Root("model.", "lm_head.weight"),)  # the first is the one that transformers writes
    embedding: str = "embed_tokens.weight"
    # Regular expressions over whole names, in which {layers} is the number of layers.
    ignored: tuple[str, ...] = (INVERSE_FREQUENCIES,)  # hold no parameter, are left out and told
    carried: tuple[str, ...] = ()  # not of the text decoder: copied to the export; these not relative to the root
    # (pattern, replacement): how transformers names its modules where its files name their tensors otherwise.
    modules: tuple[tuple[str, str], ...] = ()

    def rules(self, spec: DecoderSpec, root: Root) -> list[Rule]:
        """Returns the rules of a model, in the order in which tensors are written."""
        table = [dataclasses.replace(rule, hf=root.body + rule.hf) for rule in self.body(spec)]
        return table if spec.tied_head else [*table, Rule(root.head, "lm_head.kernel", transpose=True)]

    def module_name(self, name: str) -> str:
        """Returns how transformers names in memory what a file under the first root names `name`."""
        for pattern, replacement in self.modules:
            name = re.sub(pattern, replacement, name)
        return name

    def embedding_name(self, root: Root) -> str:
        return root.body + self.embedding

    def ignored_patterns(self, spec: DecoderSpec, root: Root) -> tuple[str, ...]:
        """Returns regular expressions of tensors that may be there and hold no parameter of this model."""
        patterns = [re.escape(root.body) + _numbered(pattern, spec) for pattern in self.ignored]
        return (*patterns, re.escape(root.head)) if spec.tied_head else tuple(patterns)

    def carried_names(self, spec: DecoderSpec, names: Collection[str]) -> list[str]:
        """Returns those of `names` that are no parameters of the decoder and go into an export as they are."""
        patterns = [re.compile(_numbered(pattern, spec)) for pattern in self.carried]
        return [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]

    def find_root(self, names: Collection[str]) -> Root | None:
        """Returns where the decoder is in a checkpoint with these tensors; None where it is nowhere."""
        return next((root for root in self.roots if self.embedding_name(root) in names), None)

    def root_of(self, body: str | None) -> Root:
        """Returns the root with this body, and for None the one that transformers writes."""
        return next((root for root in self.roots if root.body == body), self.roots[0])

    def refuse_other_roots(self, names: Collection[str], where: str) -> None:
        """Raises UserError that says what a checkpoint in which there is no known root seems to be."""
        expected = self.embedding_name(self.roots[0])
        if self.embedding in names:
            raise UserError(
                f"{where}: names its tensors '{self.embedding}' and so on, without '{self.roots[0].body}', and has no "
                "head: it was saved from the body of the model (AutoModel). Save it from AutoModelForCausalLM."
            )
        for name in names:
            if name.endswith(f".{self.embedding}"):
                raise UserError(
                    f"{where}: holds its embedding as '{name}', where '{expected}' is expected, so it was saved as a "
                    "part of another model. Save the language model alone with transformers' save_pretrained."
                )


def _numbered(pattern: str, spec: DecoderSpec) -> str:
    return pattern.replace("{layers}", str(len(spec.layers)))
