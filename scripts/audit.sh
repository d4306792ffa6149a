#!/usr/bin/env bash
# Known vulnerabilities of what requirements.lock pins, by `uv audit` and the OSV database. A report: it always succeeds,
# since what it says changes without a commit, and since not every machine reaches the database.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly SECONDS_AT_MOST=120

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pins() { sed -nE 's/^([a-z0-9][^\\]*[^\\ ]) *\\?$/#   "\1",/p' requirements.lock; }

# uv audits a project or a script, so the lock becomes the inline metadata of one: exactly these versions, whatever they
# ask of each other (pyproject.toml overrides some of that).
printf '# /// script\n# requires-python = ">=3.11,<3.14"\n# dependencies = [\n%s\n# ]\n# [tool.uv]\n%s\n%s\n# ]\n# ///\n' \
    "$(pins)" "# override-dependencies = [" "$(pins)" >"$folder/lock.py"

echo "audit: $(pins | wc -l) packages of requirements.lock"
if ! timeout "$SECONDS_AT_MOST" scripts/setup.sh uv audit --quiet --preview-features audit --script "$folder/lock.py"; then
    echo "audit: see above; a vulnerability is mended by 'make lock UPGRADE=\"--upgrade-package NAME\"'," \
        "a database that cannot be reached by running it elsewhere"
fi
