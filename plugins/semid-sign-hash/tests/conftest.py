"""Lets failures of the contract suite show values."""

import pytest

pytest.register_assert_rewrite("semid_index.testing")
