"""Adapters of selfalign: one module per framework, each imported by the user who has that framework."""

if __name__ != "selfalign.adapters":
    raise ImportError(
        f"selfalign's adapters must be imported by their full name. Received: import of {__name__!r}. "
        "Write `from selfalign.adapters.torch import SelfAlignment`, and keep the repository's root off sys.path."
    )
