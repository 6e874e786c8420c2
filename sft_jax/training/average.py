"""An exponential moving average of the parameters over the updates of a run (Polyak & Juditsky 1992).

After t updates the average is the weighted mean of the parameters after each of them, of which that of k updates ago
has the weight decay^k: an exponential average without the bias of its start. It is kept in float32, in which it can
move by less than the last bit of a bfloat16 parameter.
"""

import math

import jax
import jax.numpy as jnp


def start_average(params):
    """Returns the average before the first update, the parameters themselves, in arrays of its own."""
    return jax.tree.map(lambda p: jnp.copy(p.astype(jnp.float32)), params)


def move_average(average, params, decay: float, updates: jax.Array):
    """Returns the average after `updates` (int32 [], at least 1) updates, of which the last made `params`."""
    log_decay = jnp.float32(math.log(decay))
    share = jnp.expm1(log_decay) / jnp.expm1(updates * log_decay)  # (1 - decay) / (1 - decay^t), 1 for t = 1
    return jax.tree.map(lambda a, p: a + share * (p.astype(jnp.float32) - a), average, params)
