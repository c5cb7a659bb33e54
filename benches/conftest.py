"""A bench times a path only after it gave the reference's result: no speed of wrong answers."""

from harness.plugin import *  # noqa: F403  # fixtures, options and hooks
