"""`flowrl-mega reproduce STUDY`: a published table made again, from the base model to numbers beside it."""
