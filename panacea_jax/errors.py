"""The one exception that means "the user can fix this"."""


class InputError(Exception):
    """Bad input: a key, a file or a tensor that the user has to change.

    The message is one line that names the culprit; the command line prints it and exits with code 2.
    Anything else that escapes is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
