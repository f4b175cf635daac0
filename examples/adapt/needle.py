# SPDX-License-Identifier: Apache-2.0
"""The modules of examples/needle that this experiment shares: text, facts' places, token ids."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "needle"))

import corpus  # noqa: F401
import export  # noqa: F401
import facts  # noqa: F401
import make_tokenizer  # noqa: F401
import model  # noqa: F401
import optimizer  # noqa: F401
import samples  # noqa: F401
