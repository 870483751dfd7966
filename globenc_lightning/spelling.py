"""How names are spelt in tags and in columns."""


def hyphenated(reference: str) -> str:
    """Returns a reference as tags and columns spell it: ``integrated-gradients``."""
    return reference.replace(" ", "-")
