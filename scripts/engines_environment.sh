#!/usr/bin/env bash
# Makes the environment in which the adapters for verl and OpenRLHF are tested: those engines need an older transformers than the project.
#
#   scripts/engines_environment.sh [TARGET] [BASE]
#
# TARGET  where to make it; default: .venv-engines
# BASE    an environment of the project (such as .venv) whose packages are used where they fit, torch above all. Without one, everything is installed.
#
# It has no vLLM, SGLang or flash-attention: it is for tests on a CPU. To train, install verl as its documentation says and add this project with
# `pip install --no-deps .` (and gymnasium, bm25s, PyStemmer, platformdirs, numba, rich, which are light).
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-.venv-engines}
base=${2:-}
python=${PYTHON:-python3}
if [ -n "$base" ]; then
    python=$base/bin/python
fi

"$python" -m venv --clear "$target"
packages=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ -n "$base" ]; then
    of_base=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # what is installed here comes first on the path; addsitedir also reads the .pth files of BASE, an editable install among them
    echo "import site; site.addsitedir('$of_base')" > "$packages/_base.pth"
fi
pip=("$target/bin/python" -m pip install --disable-pip-version-check --quiet)
# TransferQueue, cachetools, uvicorn and fastapi are imported by verl's trainer, but are only in its extras, which bring in the rest of the world.
"${pip[@]}" --editable '.[agents]' 'verl==0.9.1' 'transformers==5.10.4' 'TransferQueue>=0.1.10' cachetools uvicorn fastapi \
    pytest pytest-xdist hypothesis
# OpenRLHF pins deepspeed, flash-attn and another transformers; its agent interface needs none of them.
"${pip[@]}" --no-deps 'openrlhf==0.11.2'
if ! said=$("$target/bin/python" -c 'import openrlhf.utils.agent, verl.experimental.agent_loop, verl.trainer.ppo.v1' 2>&1); then
    printf '%s\n%s\n' "$said" "$0: the engines do not import in $target" >&2
    exit 1
fi
echo '*' > "$target/.gitignore"
touch "$target/.made"
