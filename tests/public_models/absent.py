"""Classes of diffusers.models.transformers that are not tried, and why."""

_U_NET = "part of a U-Net's level, which is not told the time"
_FLEX = "its attention, flex_attention, has no gradient on a CPU"

ABSENT = {
    "AnyFlowFARTransformer3DModel": _FLEX,
    "DreamLiteTransformer2DModel": _U_NET,
    "DualTransformer2DModel": f"two in one: {_U_NET}",
    "Kandinsky6SRTransformer3DModel": _FLEX,
    "MiniMaxMusic3RVQDepthDecoder": "no diffusion: it predicts codes one after another",
    "TransformerTemporalModel": _U_NET,
    "WanAnimate2Transformer3DModel": f"reads what another forward has left in a cache; {_FLEX}",
}
