"""Values that every layer must agree on."""

IGNORE_INDEX = -100  # label of a token that is not trained, as in torch's cross-entropy
