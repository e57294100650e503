"""Arguments that do not go together."""


class Mismatch(ValueError, AssertionError):
    """An argument that does not go with the others, or with what the component was built from.

    It is an AssertionError as well, which is what pytorch-metric-learning raises of these.
    """
