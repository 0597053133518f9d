"""Names of parameters in checkpoints of version 0.1, where projections and gates were not modules of their own."""

PROJECTIONS = (
    *("to_queries", "to_keys", "to_values", "retrieve_norm", "store_norm", "q_norm", "k_norm", "multihead_rmsnorm"),
    *("retrieve_gate", "combine_heads", "queries_conv", "keys_conv", "values_conv", "activation"),
)
GATES = ("symplectic_gate", "symplectic_complexity_scale", "dmd_complexity_scale", "page_switch_events")
ROOMS = dict.fromkeys(PROJECTIONS, "projections") | dict.fromkeys(GATES, "gates")


def present_name(key: str) -> str:
    """Return the present name of a parameter of NeuralMemory."""
    room = ROOMS.get(key.partition(".")[0])
    return key if room is None else f"{room}.{key}"


def rename_earlier(module, state_dict: dict, prefix: str, *_) -> None:
    """Rename parameters of version 0.1 to their present names, in place. A pre-hook of `load_state_dict`."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if (now := present_name(name)) != name:
            state_dict[prefix + now] = state_dict.pop(key)
