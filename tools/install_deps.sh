#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs the packages of the named groups of docs/dependencies.md that are missing or too old.
#
#   tools/install_deps.sh build test     install with apt-get, through sudo when not root
#   tools/install_deps.sh --list build   print the packages only
#   tools/install_deps.sh --unless-found nvcc /usr/local/cuda/bin/nvcc cuda
#                                        nothing, if one of these two programs exists
#
# Returns at once when everything is there. Packages of the registry "pip" go into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

table=docs/dependencies.md
known=$(awk -F' *[|] *' '$5 == "apt" || $5 == "pip" {print $2}' "$table" | sort -u | xargs)

fail() {
  printf 'install_deps: %s\n' "$*" >&2
  exit 1
}

# "package version registry" of a group's rows.
rows() {
  awk -F' *[|] *' -v group="$1" \
    '$2 == group && ($5 == "apt" || $5 == "pip") {print $3, $4, $5}' "$table"
}

list_only=false
if [[ "${1:-}" == --list ]]; then
  list_only=true
  shift
fi
if [[ "${1:-}" == --unless-found ]]; then
  ! command -v "$2" "$3" >/dev/null || exit 0
  shift 3
fi
[[ $# -gt 0 ]] || fail "no group given; expected one or more of: $known"
wanted=()
for group in "$@"; do
  [[ " $known " == *" $group "* ]] || fail "found the group \"$group\", expected one of: $known"
  while read -r package version registry; do
    wanted+=("$package $version $registry")
  done < <(rows "$group")
done
if $list_only; then
  printf '%s\n' "${wanted[@]}"
  exit 0
fi

# Succeeds when the Debian package $1 is installed in version $2 or newer. The epoch is no part of
# the versions in the table.
installed() {
  local found
  found=$(dpkg-query -W -f='${db:Status-Status} ${Version}' "$1" 2>/dev/null) || return 1
  [[ "$found" == installed\ * ]] || return 1
  found=${found#installed }
  dpkg --compare-versions "${found#*:}" ge "$2"
}

missing_apt=() pip_packages=()
for entry in "${wanted[@]}"; do
  read -r package version registry <<<"$entry"
  if [[ "$registry" == pip ]]; then
    pip_packages+=("$package>=$version")
  elif ! command -v dpkg-query >/dev/null || ! installed "$package" "$version"; then
    missing_apt+=("$package")
  fi
done

if [[ ${#missing_apt[@]} -gt 0 ]]; then
  if ! command -v apt-get >/dev/null; then
    # Elsewhere the packages have other names; CMake says which one it does not find.
    printf 'install_deps: no apt-get here; if the build stops, install what stands for: %s\n' \
      "${missing_apt[*]}" >&2
  else
    as_root=()
    if [[ $(id -u) -ne 0 ]]; then
      command -v sudo >/dev/null ||
        fail "missing packages, and neither root nor sudo to install them; run as root:
  apt-get install -y ${missing_apt[*]}"
      as_root=(sudo)
    fi
    printf 'Installing %d Debian packages: %s\n' "${#missing_apt[@]}" "${missing_apt[*]}"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq ||
      fail "apt-get update failed; is this machine online?"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q \
      --no-install-recommends "${missing_apt[@]}" </dev/null |
      { grep --line-buffered '^Setting up' || true; } ||
      fail "apt-get could not install: ${missing_apt[*]}"
    for entry in "${wanted[@]}"; do
      read -r package version registry <<<"$entry"
      [[ "$registry" == pip ]] || installed "$package" "$version" ||
        fail "found $(dpkg-query -W -f='${Package} ${Version}' "$package"), expected $version" \
          "or newer; use Debian 12 or a later release"
    done
  fi
fi

if [[ ${#pip_packages[@]} -gt 0 ]]; then
  [[ -x .venv/bin/python ]] || python3 -m venv .venv
  # Looking takes a second; only a real installation is worth a line (PyTorch has 3 GB).
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index \
    "${pip_packages[@]}" 2>/dev/null; then
    printf 'Installing into .venv: %s\n' "${pip_packages[*]}"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${pip_packages[@]}" ||
      fail "pip could not install ${pip_packages[*]}; is this machine online?" \
        "\`make test PYTHON=OFF\` does without PyTorch"
  fi
fi
