"""A module that cannot be imported, because something that it imports is not there."""

import a_module_that_nobody_has  # noqa: F401
