"""InternVL-X as Flax NNX modules: vision tower, projectors, decoder, generation (design: model.md).

The order of computation is vit.py, projectors.py, internvlx.py (the merge with text), decoder.py,
loss.py; lvtc.py holds what the paper's layer-wise compression changes in it. generation.py decodes,
params.py takes a model apart into structure and parameters, sharding.py divides it over devices.

The legend of dims, used by every docstring and einsum string of this folder:

    B batch rows          I tiles (images cut to squares)     T tile slots of a row
    S sequence slots      P patches of a tile                 Q visual tokens of a tile
    m region side         M patches of a region (m * m)       V vision width
    D decoder width       N heads                             K key/value heads
    J heads per kv head   H head dim                          F mlp width
    L layers              W vocabulary rows

Einsum letters are the lower-case dims; in attention `s` is the query slot and `z` the key slot.
Kernels are stored input first. Modules are pytrees: `jax.jit`, `lax.scan`, `jax.checkpoint` and
`jax.grad` take them as they are. Every module computes in the dtype of its input and casts its
parameters to it.
"""
