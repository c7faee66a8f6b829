"""What is asked of an answer: that it is of the `openai` package's own types, with every field known to them."""

import openai


def all_fields_are_known(value, where):
    """No model of the package, however deep, holds a field that it does not declare."""
    if isinstance(value, openai.BaseModel):
        assert not value.model_extra, f"{where} has the fields {sorted(value.model_extra)} beside its own"
        for name, field in value:
            all_fields_are_known(field, f"{where}.{name}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            all_fields_are_known(item, f"{where}[{i}]")


def check_token(entry):
    """Its text is its bytes, unless they are no text, or it has none."""
    if entry.bytes is None:
        assert entry.token.startswith("token_id:"), entry
        return
    try:
        assert bytes(entry.bytes).decode() == entry.token, entry
    except UnicodeDecodeError:
        assert "\\x" in entry.token, entry
