"""The prompt, as the paper writes it: instruction, input, (evidence), response."""

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
# The trailing space is the published template's; Stanford Alpaca's own has none.
BODY = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
TEMPLATES = {"alpaca": ALPACA + BODY, "short": BODY}


PLACE = "\ue000"  # in a rendered conversation: where its last question goes (private use, U+E000)


def render(template: str, instruction: str, input: str) -> str:
    """The text a model reads, up to where it must answer.

    Args:
        template: "alpaca" (published), "short" (tiny twins: the preamble costs CPU time only), or
            "chat": the instruction then is a conversation as the model's own chat template writes
            it, with PLACE for its last question.
        input: the input, already followed by its evidence where there is any.
    """
    if template == "chat":
        return instruction.replace(PLACE, input)
    return TEMPLATES[template].format(instruction=instruction, input=input)
