"""The one error of all backbone code."""


class BackboneError(ValueError):
    """A backbone that cannot be built or weights that do not fit; the sentence says what to do."""
