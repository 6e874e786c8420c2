"""The host's side of decoding: which prompt is in which slot, on whatever mesh the model lies."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sft_jax.errors import UserError
from sft_jax.evaluation import decoding
from sft_jax.evaluation.sampling import Sampling
from sft_jax.model.decoder import Decoder
from sft_jax.model.sharding import batch_sharding, pieces_along

_FILLS = 8  # while prompts wait, an eighth of the slots is filled at once: prompts are read in groups, and few slots lie idle


class Generation(NamedTuple):
    """An answer."""

    ids: list[int]  # without the stop token; with a stop string, up to the token that completes it
    finished: bool  # the model ended it, by a stop token or a stop string; False: cut at max_new_tokens


class NumberedPrompt(NamedTuple):
    """What goes into a slot."""

    ids: Sequence[int]
    number: int  # uint32; the random bits of the answer follow from it and the seed


class Slots:
    """Sequences that are decoded together, each in a slot that takes another prompt once its answer is done.

    In a run of several processes all make the same calls.

    Attributes:
        count: slots.
        refill: prompts that are read at once while others are being answered, at most.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        longest: int,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        options: Sampling,
        seed: int = 0,
    ):
        """Makes room for at least `slots` prompts of at most `longest` tokens, and their answers."""
        self._decoder, self._options = decoder, options
        mesh = mesh_of(decoder)
        split = pieces_along(mesh, "batch") if mesh is not None else 1
        self.count = _slot_count(slots, split)
        self.refill = split * max(1, self.count // split // _FILLS)
        self._room = decoding.round_up(longest + max_new_tokens)
        self._by_row, self._whole = _placers(decoder, mesh)
        stops = np.full(-(-max(len(stop_ids), 1) // 8) * 8, -1, np.int32)
        stops[: len(stop_ids)] = list(stop_ids)
        self._stops, self._limit = self._whole(stops), self._whole(np.int32(max_new_tokens))
        self._seed = self._whole(np.uint32(seed % 2**32))
        self._lengths = np.zeros(self.count, np.int32)  # of prompts
        self._state = decoding.empty(decoder, self.count, self._room, options.penalised)

    def fill(self, prompts: Mapping[int, NumberedPrompt]) -> None:
        """Reads prompts into slots, in place of what was there, and chooses the first token of every answer."""
        for prompt in prompts.values():
            self._check(prompt.ids)
        rows = self.refill if len(prompts) <= self.refill else self.count
        chunk = decoding.chunk_for(max(len(prompt.ids) for prompt in prompts.values()))
        tokens = np.zeros((rows, -(-self._room // chunk) * chunk), np.int32)
        lengths, places, numbers = np.zeros(rows, np.int32), np.full(rows, self.count, np.int32), np.zeros(rows, np.uint32)
        for row, (slot, (ids, number)) in enumerate(prompts.items()):
            tokens[row, : len(ids)] = ids
            lengths[row], places[row], numbers[row] = len(ids), slot, number
            self._lengths[slot] = len(ids)
        self._state = decoding.fill(
            self._decoder, self._state, self._by_row(tokens), self._by_row(lengths), self._by_row(places),
            self._by_row(numbers), self._seed, self._stops, self._options, self._limit, chunk=chunk,
        )  # fmt: skip

    def _check(self, ids: Sequence[int]) -> None:
        if not len(ids):
            raise ValueError("a prompt has no tokens")
        if not (0 <= min(ids) and max(ids) < self._decoder.spec.vocab_size):
            raise UserError(
                f"A prompt holds token {max(ids) if min(ids) >= 0 else min(ids)}, outside the model's vocabulary "
                f"of {self._decoder.spec.vocab_size}; tokenizer and model do not belong together."
            )

    def advance(self, steps: int, wanted: int | None = None) -> None:
        """Adds up to `steps` tokens to every answer, and ends once `wanted` slots are done; None = all."""
        wanted = self.count if wanted is None else wanted
        self._state = decoding.advance(
            self._decoder, self._state, self._stops, self._options, self._limit,
            self._whole(np.int32(steps)), self._whole(np.int32(wanted)),
        )  # fmt: skip

    def end(self, slots: Sequence[int]) -> None:
        """Ends the answers in these slots where they are."""
        ended = np.zeros(self.count, bool)
        ended[list(slots)] = True
        self._state = decoding.end(self._state, self._whole(ended))

    def done(self) -> np.ndarray:
        """Returns bool [slots]: whether `advance` would add nothing to the answer, or there is none."""
        return self._get(self._state.done)

    def answers(self, slots: Sequence[int]) -> list[Generation]:
        """Returns the answers in these slots so far."""
        tokens, lengths, stopped = self._get((self._state.tokens, self._state.lengths, self._state.stopped))
        return [Generation(tokens[s, self._lengths[s] : lengths[s]].tolist(), bool(stopped[s])) for s in slots]

    def _get(self, arrays):
        return jax.device_get(decoding.replicated(self._decoder, arrays))


def mesh_of(decoder: Decoder) -> Mesh | None:
    """Returns the mesh on which the parameters lie, None where they lie on one device without a mesh."""
    sharding = decoder.embed.embedding[...].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _slot_count(wanted: int, split: int) -> int:
    """Returns one of few numbers of slots, a multiple of the `split` devices that rows are split over."""
    each = -(-wanted // split)
    return split * (decoding.round_up(each) if each > 4 else 1 << (each - 1).bit_length())


Place = Callable[[np.ndarray | np.generic], jax.Array]


def _placers(decoder: Decoder, mesh: Mesh | None) -> tuple[Place, Place]:
    """Returns two functions that put a host array where the parameters are: rows split, and whole on every device.

    Every process gives the same array and keeps the part for its own devices.
    """
    if mesh is None:
        device = decoder.embed.embedding[...].sharding
        return (lambda x: jax.device_put(x, device),) * 2

    def placer(sharding: NamedSharding) -> Place:
        return lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

    return placer(batch_sharding(mesh)), placer(NamedSharding(mesh, PartitionSpec()))
