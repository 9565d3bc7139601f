"""Model specs that are valid, and as odd as they may be."""

from typing import Any

from hypothesis import strategies as st

#: Text that may be kept, with what YAML is proud of.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
ODD = st.sampled_from(
    ["yes", "null", "~", "1", "1.0", "1e3", "0x1f", "2026-01-01", "<<", "- a", "#", ": ", "!x",
     "&a", "*a", " a ", "\t", "\n", "a\nb\n", "\x85", "\u2028", "=", "%", "@", "`", '"', "'",
     "{}", "[]", "|", ">", "?", "---", "..."]
)  # fmt: skip
WORDS = TEXT | ODD
NAMES = st.text(st.sampled_from("abzAZ019._:/-"), min_size=1, max_size=128)


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    tail = draw(st.text(st.sampled_from("abc 'é模\\{}$#:"), max_size=20))
    sources: list[dict[str, Any]] = [
        {"source": "local_path", "local_path": f"/{tail}.gguf"},
        {"source": "huggingface", "huggingface_repo_id": f"org/{tail}",
         "huggingface_filename": f"{tail}*.gguf"},
        {"source": "huggingface", "huggingface_repo_id": f"org/{tail}", "backend": "llama-box"},
    ]  # fmt: skip
    optional = {
        "description": st.none() | WORDS,
        "replicas": st.just(0),  # what runs is not what this is about
        "placement_strategy": st.sampled_from(["spread", "binpack"]),
        "worker_selector": st.dictionaries(WORDS, WORDS, max_size=2),
        "restart_on_error": st.booleans(),
        "categories": st.lists(st.sampled_from(["llm", "embedding", "reranker"]), max_size=2),
        "backend_version": st.none() | WORDS,
        "backend_parameters": st.lists(WORDS.map(lambda w: f"--x={w}"), max_size=3),
        "env": st.dictionaries(WORDS, WORDS, max_size=3),
    }
    more = draw(st.fixed_dictionaries({}, optional=optional))
    return {"name": draw(NAMES), "replicas": 0, **draw(st.sampled_from(sources)), **more}
