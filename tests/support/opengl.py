"""Skip tests that render on machines that cannot."""

import functools

import pytest

from data.rendering.renderer import create_context
from utils.errors import UserError


@functools.cache
def missing_opengl() -> str:
    """Return why rendering does not work here; empty if it does."""
    try:
        create_context().release()
    except UserError as error:
        return str(error)
    return ""


needs_opengl = pytest.mark.skipif(bool(missing_opengl()), reason=missing_opengl())
