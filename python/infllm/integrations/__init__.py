# SPDX-License-Identifier: Apache-2.0
"""Ways into other packages; import the one you need."""
