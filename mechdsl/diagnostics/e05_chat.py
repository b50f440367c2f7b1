"""E055x: chats, and the templates of tokenizers that write them."""

from mechdsl.base.record import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class NoChatTemplate(Diagnostic):
    """A chat for a model whose tokenizer says nothing of chats."""

    code = "E0550"
    title = "the model has no chat template, so nothing says how it reads turns"
    label = "for a tokenizer with a `chat_template`"
    help = (
        "write the turns in a text as the model was trained on them: "
        '`template "User: {{question}}\\nAssistant:"`'
    )


@keyword_record
class BadChatTemplate(Diagnostic):
    """A template that is none, or too large."""

    code = "E0551"
    title = "the model's chat template can't be used: {reason}"
    label = "turns for it to write"
    help = "{hint}"
    reason: str
    hint: str


@keyword_record
class ChatRefused(Diagnostic):
    """Turns that the template doesn't take, or doesn't write."""

    code = "E0552"
    hangs_on = frozenset({"tokens"})
    title = "the model's chat template can't write this: {reason}"
    label = "in {rows}"
    help = "{hint}"
    reason: str
    rows: str
    hint: str


@keyword_record
class MarkerInText(Diagnostic):
    """A text that is put into a chat and marks turns there."""

    code = "E0553"
    hangs_on = frozenset({"tokens"})
    title = "the text {text} holds `{marker}`, which is a special token in a chat"
    label = "the model would read the end of a turn in it"
    help = "put in another text"
    text: str
    marker: str
