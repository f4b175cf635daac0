# SPDX-License-Identifier: Apache-2.0
"""The modules of examples/needle that this experiment shares: text, facts' places, token ids."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "needle"))

import corpus  # noqa: E402, F401
import facts  # noqa: E402, F401
import samples  # noqa: E402, F401
import make_tokenizer  # noqa: E402, F401
import optimizer  # noqa: E402, F401
import selection  # noqa: E402, F401
import export  # noqa: E402, F401
import model  # noqa: E402, F401
