# SPDX-License-Identifier: Apache-2.0
# The compiled module, python/bindings; not for use from outside.
from typing import Any

def __getattr__(name: str) -> Any: ...
