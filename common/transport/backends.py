"""The process groups that a pair can be made of, best first."""

from __future__ import annotations

from collections.abc import Mapping

from common.transport.gloo import GlooGroup, GlooJoining
from common.transport.group import Join

BACKENDS: Mapping[str, Join] = {GlooGroup.transport: GlooJoining}
