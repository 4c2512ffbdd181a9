"""Errors that a user can act on: one line that names what is wrong and the next thing to do."""

from .untrusted import visible


class CourseError(Exception):
    """Base of all errors that the command line prints as one line, with exit status 2.

    A message may quote a row of a data file, a file's name or another library. So whoever shows it, a terminal, a log
    or a notebook's traceback, gets it with control and bidirectional characters written out.
    """

    def __str__(self) -> str:
        return visible(super().__str__())


class SettingsError(CourseError):
    """A setting has a value that cannot be used."""


class DataError(CourseError):
    """A data set, or a row of it, cannot be used."""


class ModelError(CourseError):
    """A model or tokenizer cannot be loaded or used."""


class ArtefactError(CourseError):
    """A file of an earlier step is missing, damaged or from other settings."""


class TrainingError(CourseError):
    """Training cannot go on, such as after a loss that is not finite."""
