# To be sourced: which release of SGLang, SGLANG_VERSION or the default, and the environment that it has.
# The default is the newest on a CPU, and on a GPU the one that was run there.
default_release=0.5.23
if command -v nvidia-smi >/dev/null; then default_release=0.5.17; fi
release=${SGLANG_VERSION:-$default_release}
venv=.venv
[ "$release" = "$default_release" ] || venv=.venv-$release
if [ ! -e "test/cpu_engine/requirements-$release.txt" ]; then
  echo "SGLANG_VERSION=$release is not one of" test/cpu_engine/requirements-*.txt | sed 's|test/cpu_engine/requirements-||g; s|\.txt||g' >&2
  exit 2
fi
