"""The pictures of the transfer study."""

from __future__ import annotations
