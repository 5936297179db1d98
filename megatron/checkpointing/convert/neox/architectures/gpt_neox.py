"""GPT-NeoX, and Pythia as an instance of it: our names are NeoX's own."""

from __future__ import annotations

from megatron.checkpointing.convert.neox.neox_architecture import NEOX_ARCHITECTURES, NeoxArchitecture, TensorKey

LINEAR = NeoxArchitecture(
    keys={
        "use_bias_in_attn_linear": TensorKey(
            read=lambda layer: "attention.query_key_value.bias" in layer,
            configured=lambda model: model.use_bias_in_attn_linear,
        )
    },
    deciding_keys=(
        (r"attention\.\w+\.bias", "use_bias_in_attn_linear"),
        (r"mlp\.\w+\.bias", "use_bias_in_mlp"),
    ),
    # Newer versions of GPT-NeoX call the matrices of the MLP by their order.
    also_read=(("mlp.linear1.", "mlp.dense_h_to_4h."), ("mlp.linear2.", "mlp.dense_4h_to_h.")),
    row_biases=("attention.dense.bias", "mlp.dense_4h_to_h.bias"),
    row_biases_are_summed=lambda model: model.parallel_residual,
)
"""Layers of linear projections and a two-matrix MLP."""

NEOX_ARCHITECTURES.register("gpt_neox")(LINEAR)
