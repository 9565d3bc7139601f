"""What a model's own files say of it. Read once, stored with the model."""

from gpustack.schemas.base import Fact


class Profile(Fact):
    """Facts for memory estimates.

    Attributes:
        weights_bytes: size of the weights as stored, all files together.
        architecture: as the file names it, e.g. "llama"; "" when unknown.
        layers: transformer blocks; 0 when unknown.
        attention_heads: query heads.
        kv_heads: heads that store keys and values, per layer.
        head_dim: length of one head's key, elements.
        embedding_length: width of the residual stream, elements.
        vocabulary: tokens in the vocabulary.
        max_context: tokens the model was trained for; 0 when unknown.
        pooling: how token vectors become one ("mean", "cls", "last", "rank"), "" for none.
        source: where these facts come from, for people to read.
        problem: why the files could not be read in full; "" when they could.
    """

    weights_bytes: int
    architecture: str = ""
    layers: int = 0
    attention_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    embedding_length: int = 0
    vocabulary: int = 0
    max_context: int = 0
    pooling: str = ""
    source: str = ""
    problem: str = ""
