"""Errors that a user can act on: one line that names what is wrong and the next thing to do."""


class CourseError(Exception):
    """Base of all errors that the command line prints as one line, with exit status 2."""


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
