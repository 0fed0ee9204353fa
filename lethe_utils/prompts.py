"""The prompt, as the paper writes it: instruction, input, (evidence), response."""

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
# The trailing space is the published template's; Stanford Alpaca's own has none.
BODY = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
TEMPLATES = {"alpaca": ALPACA + BODY, "short": BODY}


def render(template: str, instruction: str, input: str) -> str:
    """The text a model reads, up to where it must answer.

    Args:
        template: "alpaca" (published) or "short" (tiny twins: the preamble costs CPU time only).
        input: the input, already followed by its evidence where there is any.
    """
    return TEMPLATES[template].format(instruction=instruction, input=input)
