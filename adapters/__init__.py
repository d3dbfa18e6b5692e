"""Adapters of selfalign: a package per framework, imported by whoever has that framework."""

if __name__ != "selfalign.adapters":
    raise ImportError(
        "selfalign's adapters must be imported by their full name. Received: import of "
        f"{__name__!r}. Write `from selfalign.adapters.torch import SelfAlignment`, and keep the "
        "repository's root off sys.path."
    )
