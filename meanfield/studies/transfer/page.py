"""The sections of the transfer study's page: sentences that carry their figures, pictures, small tables."""

from __future__ import annotations
