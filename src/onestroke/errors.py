"""What the user can mend. Every error says what is wrong, where, and the fix, and prints as one line.

OnestrokeError
├── RecipeError      an unknown key, a value out of range
├── ModelError       a teacher or student that cannot be loaded or is not supported
├── DataError        a data set that cannot be read or holds too little
├── NonFiniteLoss    training stopped at a NaN or infinity; the last checkpoint is whole
├── TrainingAlarm    training stopped because it goes wrong, as train.on_alarm asks; the last checkpoint is whole
├── CheckpointError  a run folder that belongs to another recipe, or a checkpoint that cannot be read
└── ResourceError    no room on the device or the disk
"""


class OnestrokeError(Exception):
    """`what` is wrong, `where` (a file, a key, a step), and the `fix`."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where else what
        super().__init__(" ".join(f"{line}. {fix}".split()) if fix else line)


class RecipeError(OnestrokeError):
    """A recipe key that does not exist, or a value that cannot be used."""


class ModelError(OnestrokeError):
    """A model that cannot be loaded, or that onestroke cannot distil."""


class DataError(OnestrokeError):
    """Pictures or captions that cannot be used."""


class NonFiniteLoss(OnestrokeError):
    """A loss or gradient that is not finite."""


class TrainingAlarm(OnestrokeError):
    """A run that goes wrong: the discriminator wins, the student ignores the prompt, diversity falls."""


class CheckpointError(OnestrokeError):
    """A checkpoint that cannot be read or that another recipe wrote."""


class ResourceError(OnestrokeError):
    """Memory or disk space that ran out."""
