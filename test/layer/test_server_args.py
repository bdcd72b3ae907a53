"""The arguments, however they are given, and every refusal."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from types import SimpleNamespace

import msgspec
import pytest
import torch

from sglang.srt.layers.misa import operations, process
from sglang.srt.layers.misa import server_args as module
from sglang.srt.layers.misa.config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_MIN_CONTEXT,
    DEFAULT_RERANK_CANDIDATES,
    MAX_CONTEXT,
    MisaConfig,
)
from sglang.srt.layers.misa.environment import EVAL_SELECTION, SELECTIONS
from sglang.srt.layers.misa.releases.installed import RELEASE
from sglang.srt.server_args import ServerArgs
from sglang.version import __version__ as sglang_version
from sglang_misa.server import server_env

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="resolves arguments for the CPU engine"
)

HEADS, TOPK = 64, 256
POOLED = "--misa-router pooled"


def chain(steps: int, algorithm: str = "EAGLE") -> str:
    """Speculative decoding with so many drafts, one after the other."""
    return (
        f"--speculative-algorithm {algorithm} --speculative-num-steps {steps} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {steps + 1}"
    )


@pytest.fixture(scope="module")
def model(tiny_model):
    return str(tiny_model("deepseek_v32", 2, TOPK))


@pytest.fixture(scope="module")
def parse_off(model):
    """parse_off(flags) -> the resolved arguments of a server with the tiny model, without --enable-misa."""
    from sglang_cpu_engine.launch import FLAGS

    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    def resolved(flags="", path=model):
        args = prepare_server_args(["--model-path", path, *FLAGS, *flags.split()])
        RELEASE.resolve(args)
        return args

    return resolved


@pytest.fixture(scope="module")
def parse(parse_off):
    """parse(flags) -> those of a server with --enable-misa."""
    return lambda flags="", *path: parse_off(f"--enable-misa {flags}", *path)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """SGLang sets this for good with context parallelism, and not where it is set."""
    monkeypatch.setenv("SGLANG_ENABLE_CP_V2", "0")


# Of arguments that say nothing but --enable-misa.
DEFAULTS = MisaConfig(rerank_candidates=DEFAULT_RERANK_CANDIDATES)


def refusal(function, *args) -> str:
    with pytest.raises(ValueError) as error:
        function(*args)
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message, "one sentence, please"
    return message


def test_defaults(parse):
    args = parse()
    assert args.enable_misa
    assert args.misa_block_size is None and args.misa_min_context is None
    assert args.misa_audit_interval == 0
    config = module.misa_config(args)
    assert config == MisaConfig(
        router="sampled",
        active_heads=8,
        block_size=None,
        rerank_candidates=DEFAULT_RERANK_CANDIDATES,
        min_context=0,
        decode="dsa",
    )


def test_values_at_the_bounds_are_accepted(parse):
    for flags in (
        "--misa-active-heads 1",
        f"--misa-active-heads {HEADS}",
        "--misa-router sampled --misa-active-heads 1",
        "--misa-router pooled --misa-active-heads 1",
        "--misa-router pooled --misa-block-size 64",
        f"--misa-router pooled --misa-block-size {MAX_CONTEXT}",
        "--misa-decode dsa",
        "--misa-decode misa",
        # They say how SGLang's own indexer decodes.
        "--dsa-topk-backend flashinfer",
        "--dsa-paged-mqa-logits-backend cutedsl",
        # Where index K moves, the sampled router follows it.
        "--enable-hierarchical-cache",
        "--enable-hierarchical-cache --hicache-mem-layout layer_first --hicache-write-policy write_back",
        "--disaggregation-mode prefill",
        "--disaggregation-mode prefill --enable-hierarchical-cache",
        "--disaggregation-mode decode",
        "--disaggregation-mode decode --disaggregation-decode-enable-radix-cache",
        f"--misa-rerank-candidates {TOPK}",
        f"--misa-rerank-candidates {MAX_CONTEXT}",
        "--misa-min-context 0",
        "--misa-min-context 4096",
        "--misa-audit-interval 1",
        *(chain(steps) for steps in (1, 3, 5)),
        chain(3, "NEXTN"),
        f"{POOLED} {chain(3)}",
    ):
        parse(flags)


@pytest.mark.parametrize(
    "flags, remedy",
    [
        ("--misa-active-heads 0", "between 1 and 64"),
        ("--misa-active-heads 65", "between 1 and 64"),
        ("--misa-active-heads -8", "between 1 and 64"),
        (f"{POOLED} --misa-block-size 0", "positive multiple of 64"),
        (f"{POOLED} --misa-block-size -64", "positive multiple of 64"),
        (f"{POOLED} --misa-block-size 100", "positive multiple of 64"),
        (f"{POOLED} --misa-block-size 4194368", "at most 4194304"),
        (f"{POOLED} --misa-block-size 2147483648", "at most 4194304"),
        (
            "--misa-block-size 1024",
            "drop --misa-block-size or add --misa-router pooled",
        ),
        (
            "--misa-router sampled --misa-block-size 0",
            "drop --misa-block-size or add --misa-router pooled",
        ),
        ("--misa-rerank-candidates 4194305", "at most 4194304"),
        ("--misa-rerank-candidates 255", "at least 256"),
        ("--misa-rerank-candidates -1", "at least 256"),
        ("--misa-min-context -1", "use 0"),
        ("--misa-audit-interval -1", "use 0"),
        (
            f"--misa-audit-interval 1000 --misa-active-heads {HEADS}",
            "drop --misa-audit-interval",
        ),
    ],
)
def test_bad_values(parse, flags, remedy):
    message = refusal(parse, flags)
    wrong = " ".join(flags.split()[-2:])
    assert wrong in message and remedy in message


@pytest.mark.parametrize("name", ["router", "decode"])
def test_no_such_choice(parse, name, capsys):
    with pytest.raises(SystemExit):
        parse(f"--misa-{name} best")
    assert f"--misa-{name}: invalid choice: 'best'" in capsys.readouterr().err
    # A program may hand over what the command line does not take.
    args = parse()
    values, *beside = RELEASE.state(args)
    values = {**values, f"misa_{name}": "best"}
    args = RELEASE.restored(type(args), values, *beside)
    message = refusal(module.check_misa_server_args, args)
    assert f"--misa-{name} best is not" in message and "drop" in message


def test_what_is_unset(parse, monkeypatch):
    """The routers, and the evaluation, have defaults of their own."""

    def config(flags=""):
        return module.misa_config(parse(flags))

    assert config().block_size is None
    assert config(POOLED).block_size == DEFAULT_BLOCK_SIZE == 1024
    assert config(f"{POOLED} --misa-block-size 64").block_size == 64
    assert config().rerank_candidates == DEFAULT_RERANK_CANDIDATES == 4096
    assert config(POOLED).rerank_candidates == 0
    assert config("--misa-rerank-candidates 0").rerank_candidates == 0
    assert config(f"{POOLED} --misa-rerank-candidates 512").rerank_candidates == 512
    assert config("--misa-min-context 700").min_context == 700
    monkeypatch.setenv(EVAL_SELECTION, "hisa")
    assert config().rerank_candidates == 0


@pytest.mark.parametrize("flag", ["active-heads", "block-size", "rerank-candidates"])
def test_values_that_are_no_numbers(parse, flag, capsys):
    with pytest.raises(SystemExit):
        parse(f"--misa-{flag} many")
    assert f"--misa-{flag}: invalid int value: 'many'" in capsys.readouterr().err


CP = "--tp-size 2 --enable-prefill-cp --cp-strategy"
# Those of one release.
COMBINATIONS_OF = {
    "0.5.17": [
        ("--attn-cp-size 2 --tp-size 2", "drop --attn-cp-size"),
        (f"{CP} zigzag", "use these, or drop"),
        (f"{CP} interleave --misa-router pooled", "use --misa-router sampled"),
    ],
    "0.5.23": [
        (f"{CP} interleave", "drop --enable-prefill-cp"),
        (
            f"{chain(3)} --misa-decode misa --speculative-dsa-topk-backend flashinfer",
            "drop --speculative-dsa-topk-backend flashinfer",
        ),
    ],
}
COMBINATIONS = [
    *COMBINATIONS_OF[sglang_version],
    ("--use-ray", "drop --use-ray"),
    ("--dcp-size 2 --tp-size 2", "drop --dcp-size"),
    (
        f"{POOLED} --disaggregation-mode prefill",
        "drop --misa-router or --disaggregation-mode",
    ),
    (
        f"{POOLED} --disaggregation-mode decode",
        "drop --misa-router or --disaggregation-mode",
    ),
    (
        f"{POOLED} --enable-hierarchical-cache",
        "drop --misa-router or --enable-hierarchical-cache",
    ),
    (
        f"--enable-hierarchical-cache {chain(3)}",
        "drop --enable-hierarchical-cache or --speculative-algorithm",
    ),
    (
        "--disaggregation-mode decode --disaggregation-decode-enable-radix-cache --enable-hierarchical-cache",
        "drop --enable-hierarchical-cache there",
    ),
    (
        "--disaggregation-mode decode --disaggregation-decode-enable-offload-kvcache --hicache-storage-backend file",
        "drop --disaggregation-decode-enable-offload-kvcache",
    ),
    ("--enable-lmcache", "drop --enable-lmcache"),
    ("--enable-flexkv", "--enable-flexkv"),
    ("--enable-hisparse", "drop --enable-hisparse"),
    *(
        (chain(3, algorithm), "set --speculative-algorithm to EAGLE")
        for algorithm in ("EAGLE3", "STANDALONE")
    ),
    (
        "--speculative-algorithm NGRAM --speculative-ngram-max-bfs-breadth 1",
        "set --speculative-algorithm to EAGLE",
    ),
    (f"{chain(3)} --enable-multi-layer-eagle", "drop --enable-multi-layer-eagle"),
    (
        f"{chain(3)} --speculative-draft-attention-backend flashinfer",
        "drop --speculative-draft-attention-backend",
    ),
    ("--prefill-attention-backend flashinfer", "--prefill-attention-backend"),
    ("--decode-attention-backend flashinfer", "--decode-attention-backend"),
    ("--cuda-graph-backend-prefill full", "drop --cuda-graph-backend-prefill full"),
    (
        "--misa-decode misa --dsa-topk-backend flashinfer",
        "drop --dsa-topk-backend flashinfer",
    ),
    (
        "--misa-decode misa --dsa-paged-mqa-logits-backend cutedsl",
        "drop --dsa-paged-mqa-logits-backend",
    ),
]


@pytest.mark.parametrize("flags, remedy", COMBINATIONS)
def test_unsupported_combinations(parse, flags, remedy):
    message = refusal(parse, flags)
    assert "--enable-misa" in message and remedy in message


@pytest.mark.skipif(
    sglang_version != "0.5.17", reason="refused with the other releases"
)
def test_context_parallelism_that_deals_rows_out(parse):
    args = parse(f"{CP} interleave")
    assert RELEASE.resolved(args).attn_cp_size == 2 and args.misa_router == "sampled"


# SGLang itself changes or rejects these on a CPU before MISA sees them.
SETTINGS_OF = {
    "0.5.17": [],
    "0.5.23": [
        ("attn_cp_size", 2, "drop --enable-prefill-cp"),
        ("enable_kv_cache_sharding", True, "drop --enable-kv-cache-sharding"),
        (
            "enable_unified_cache_external_linker",
            True,
            "drop --enable-unified-cache-external-linker",
        ),
        ("enable_linker_mla_dedup", True, "--enable-linker-mla-dedup"),
        (
            "disaggregation_decode_retraction_backup",
            "host_pool",
            "--disaggregation-decode-retraction-backup host_pool",
        ),
        ("enable_pd_role_switch", True, "drop --enable-pd-role-switch"),
        ("enable_nvidia_megakernel", True, "drop --enable-nvidia-megakernel"),
    ],
}
SETTINGS = [
    *SETTINGS_OF[sglang_version],
    ("page_size", 32, "--page-size"),
    ("page_size", 128, "--page-size"),
    ("device", "npu", "NPU"),
    ("device", "xpu", "XPU"),
    ("enable_dsa_cache_layer_split", True, "drop --enable-dsa-cache-layer-split"),
]


@pytest.mark.parametrize("name, value, remedy", SETTINGS)
def test_unsupported_settings(parse, name, value, remedy):
    args = parse()
    RELEASE.decide(args, **{name: value})
    message = refusal(module.check_misa_server_args, args)
    assert "--enable-misa" in message and remedy in message


def test_rocm(parse, monkeypatch):
    args = parse()
    monkeypatch.setattr(module, "is_hip", lambda: True)
    assert "ROCm" in refusal(module.check_misa_server_args, args)


def test_cpu_without_the_engine(parse, monkeypatch):
    args = parse()
    monkeypatch.setattr(module, "is_cpu", lambda: False)
    message = refusal(module.check_misa_server_args, args)
    assert "set SGLANG_USE_CPU_ENGINE=1" in message


EVALUATIONS = [
    ("hiza", "", "set it to hisa, random-heads"),
    (
        "hisa",
        "--misa-decode misa --cuda-graph-backend-decode full",
        "add --disable-cuda-graph",
    ),
    ("hisa", "--cuda-graph-backend-prefill breakable", "add --disable-cuda-graph"),
    # MISA would select in verify.
    (
        "hisa",
        f"{chain(3)} --cuda-graph-backend-decode full",
        "add --disable-cuda-graph",
    ),
    ("random-heads", "--misa-rerank-candidates 512", "drop --misa-rerank-candidates"),
    ("heaviest-heads", "--misa-min-context 512", "--misa-min-context"),
    ("hisa", "--misa-audit-interval 1000", "drop --misa-audit-interval"),
]


@pytest.mark.parametrize("name, flags, remedy", EVALUATIONS)
def test_evaluation(parse, name, flags, remedy, monkeypatch):
    monkeypatch.setenv(EVAL_SELECTION, name)
    message = refusal(parse, flags)
    assert f"{EVAL_SELECTION}" in message and remedy in message
    monkeypatch.setenv(EVAL_SELECTION, "heaviest-heads")
    parse("--misa-active-heads 4")
    # In decode SGLang's own indexer selects.
    parse("--cuda-graph-backend-decode full")
    if name in SELECTIONS:
        # Without an evaluation the same flags do.
        monkeypatch.setenv(EVAL_SELECTION, "")
        parse(flags)


def test_evaluation_without_misa(parse_off, monkeypatch):
    monkeypatch.setenv(EVAL_SELECTION, "hisa")
    message = refusal(parse_off)
    assert f"{EVAL_SELECTION} is set" in message
    assert "add --enable-misa" in message


@pytest.fixture
def on_gpu(parse, monkeypatch):
    """on_gpu(flags, path) -> the arguments as resolved on a machine with a GPU whose kernels run."""
    monkeypatch.setattr(module, "kernels_problem", lambda: None)

    def resolve(*given):
        args = parse(*given)
        RELEASE.decide(args, device="cuda")
        return args

    return resolve


def test_kernels_that_run(on_gpu):
    module.check_misa_server_args(on_gpu())
    module.check_misa_server_args(on_gpu("--misa-rerank-candidates 16384"))


def test_short_prompts_on_a_gpu(on_gpu):
    """Where re-ranking costs more than it saves, SGLang's own indexer selects, unless something else is asked for."""

    def min_context(*given):
        args = on_gpu(*given)
        module.check_misa_server_args(args)
        return module.misa_config(args).min_context

    assert min_context() == DEFAULT_MIN_CONTEXT[HEADS] > 0
    assert min_context("--misa-rerank-candidates 0") == 0
    assert min_context(POOLED) == 0
    assert min_context("--misa-min-context 0") == 0
    assert min_context("--misa-min-context 700") == 700


def test_without_the_kernels(on_gpu, monkeypatch):
    args = on_gpu()
    monkeypatch.setattr(module, "kernels_problem", operations.kernels_problem)
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", None)
    message = refusal(module.check_misa_server_args, args)
    assert "--enable-misa: sgl-kernel-misa cannot be imported" in message
    assert "pip install --no-build-isolation ./sgl-kernel-misa" in message


def test_kernels_that_do_not_run_here(on_gpu, monkeypatch):
    def check_device():
        raise RuntimeError("compute capability 8.0, not 9.0.")

    args = on_gpu()
    monkeypatch.setattr(module, "kernels_problem", operations.kernels_problem)
    kernels = SimpleNamespace(check_device=check_device)
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", kernels)
    message = refusal(module.check_misa_server_args, args)
    assert "--enable-misa: sgl-kernel-misa does not run on this GPU" in message
    assert "compute capability 8.0, not 9.0" in message
    assert "drop --enable-misa" in message


def test_a_cpu_needs_no_kernels(parse, monkeypatch):
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", None)
    parse("--misa-rerank-candidates 1000")


def test_draft_tokens_that_the_kernels_do_not_take(on_gpu, monkeypatch):
    kernels = operations.operations(torch.device("cuda"))
    monkeypatch.setattr(kernels, "MAX_ROWS", 4)
    module.check_misa_server_args(on_gpu(chain(3)))
    message = refusal(module.check_misa_server_args, on_gpu(chain(4)))
    assert "--speculative-num-draft-tokens 5" in message and "at most 4" in message
    # Its number of drafts changes while it runs: 7 at most.
    adaptive = on_gpu("--speculative-algorithm EAGLE --speculative-adaptive")
    message = refusal(module.check_misa_server_args, adaptive)
    assert "--speculative-num-draft-tokens 8" in message


@pytest.mark.parametrize("candidates", [1000, 16448])
def test_candidates_that_the_kernels_do_not_take(on_gpu, candidates):
    args = on_gpu(f"--misa-rerank-candidates {candidates}")
    message = refusal(module.check_misa_server_args, args)
    assert f"--misa-rerank-candidates {candidates}" in message
    assert "multiple of 64 up to 16384" in message and "use 0" in message


def test_models_that_the_kernels_do_not_take(on_gpu, tiny_model, tmp_path):
    path = model_with(tiny_model, tmp_path / "topk", index_topk=100)
    message = refusal(module.check_misa_server_args, on_gpu("", path))
    assert "index_topk=100" in message and "drop --enable-misa" in message
    path = model_with(tiny_model, tmp_path / "heads", index_n_heads=16)
    message = refusal(module.check_misa_server_args, on_gpu("", path))
    assert "32 or 64 heads" in message and "drop --enable-misa" in message


def test_every_refusal_is_tested():
    remedies = [row[-1] for row in COMBINATIONS + SETTINGS + EVALUATIONS]
    remedies += ["ROCm", "set SGLANG_USE_CPU_ENGINE=1", "IndexerKPool"]
    for refusal in (*RELEASE.REFUSALS, *module.REFUSALS):
        assert any(remedy in refusal.message for remedy in remedies), refusal


def model_with(tiny_model, tmp_path, **changes):
    """A copy of the tiny model's directory with another configuration."""
    import json
    import shutil

    path = tmp_path / "model"
    shutil.copytree(tiny_model("deepseek_v32", 2, TOPK), path)
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    config = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_a_model_without_dsa(parse, tiny_model, tmp_path):
    path = model_with(
        tiny_model,
        tmp_path,
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        index_topk=None,
    )
    message = refusal(parse, "--attention-backend torch_native", path)
    assert "DeepSeek Sparse Attention" in message and "drop --enable-misa" in message


@pytest.mark.parametrize(
    "architecture", ["DeepseekV4ForCausalLM", "Glm5NextForCausalLM"]
)
def test_a_model_with_another_indexer(parse, architecture, monkeypatch):
    args = parse()
    hf_config = copy.copy(RELEASE.model_config(args).hf_config)
    hf_config.architectures = [architecture]
    monkeypatch.setattr(RELEASE.model_config(args), "hf_config", hf_config)
    message = refusal(module.check_misa_server_args, args)
    assert f"({architecture}) is not; drop --enable-misa" in message


# Their layers have SGLang's Indexer, whose heads the kernels may not have.
SAME_INDEXER = {
    "0.5.17": ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"],
    "0.5.23": [
        *("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "HYV4ForCausalLM"),
        *("LongcatFlashForCausalLM", "Dots3NoteForCausalLM"),
        *("MistralLarge3ForCausalLM", "PixtralForConditionalGeneration"),
    ],
}


@pytest.mark.parametrize("architecture", SAME_INDEXER[sglang_version])
def test_models_with_the_same_indexer(on_gpu, architecture, monkeypatch):
    args = on_gpu()
    hf_config = copy.copy(RELEASE.model_config(args).hf_config)
    hf_config.architectures = [architecture]
    monkeypatch.setattr(RELEASE.model_config(args), "hf_config", hf_config)
    module.check_misa_server_args(args)
    hf_config.index_n_heads = 16
    message = refusal(module.check_misa_server_args, args)
    assert "indexers of 32 or 64 heads, not for the 16 of" in message


@pytest.mark.skipif(sglang_version == "0.5.17", reason="it has no such model")
def test_a_model_that_pools_index_keys(parse, monkeypatch):
    args = parse()
    hf_config = copy.copy(RELEASE.model_config(args).hf_config)
    hf_config.architectures = ["Glm5NextForConditionalGeneration"]
    hf_config.index_kpool = 4
    monkeypatch.setattr(RELEASE.model_config(args), "hf_config", hf_config)
    assert "IndexerKPool" in refusal(module.check_misa_server_args, args)


@pytest.mark.parametrize("name", ["index_n_heads", "index_topk"])
@pytest.mark.parametrize("value", [None, 0, -1, "64", 64.0, True, [64]])
def test_a_model_whose_config_is_wrong(parse, name, value, monkeypatch):
    """`None` stands for a config without the value too."""
    args = parse()
    hf_config = copy.copy(RELEASE.model_config(args).hf_config)
    setattr(hf_config, name, value)
    monkeypatch.setattr(RELEASE.model_config(args), "hf_config", hf_config)
    # Without index_topk a model is none with DSA.
    monkeypatch.setattr(module, "is_deepseek_dsa", lambda _: True)
    message = refusal(module.check_misa_server_args, args)
    assert f"{name}={value!r}" in message and "drop --enable-misa" in message
    delattr(hf_config, name)
    assert f"{name}=None" in refusal(module.check_misa_server_args, args)


@pytest.mark.parametrize("index_n_heads", [None, 0])
def test_a_server_whose_models_config_is_wrong(
    parse, tiny_model, tmp_path, index_n_heads
):
    path = model_with(tiny_model, tmp_path, index_n_heads=index_n_heads)
    assert "index_n_heads=" in refusal(parse, "", path)


def test_a_model_that_selects_less_than_a_page(parse, tiny_model, tmp_path):
    path = model_with(tiny_model, tmp_path, index_topk=32)
    assert "index_topk=32" in refusal(parse, "", path)


def test_without_misa_nothing_is_refused(parse_off):
    for flags in ("--enable-hierarchical-cache", "--misa-block-size=7"):
        assert module.misa_config(parse_off(flags)) is None


@dataclasses.dataclass
class OtherFields:
    other: int = 3


# Another plugin's class.
OtherArgs = RELEASE.subclass(
    "OtherArgs", (ServerArgs,), OtherFields, __module__=__name__
)


def replaced(args, **values):
    """A new record with other values, resolved."""
    if dataclasses.is_dataclass(args):
        return dataclasses.replace(args, **values)
    args = msgspec.structs.replace(args, **values)
    args.resolve_once()
    return args


def given(args):
    """What SGLang's own class was given."""
    values = RELEASE.state(args)[0]
    return {name: values[name] for name in RELEASE.field_names(ServerArgs)}


def test_copies(parse, monkeypatch):
    """However they are copied, the arguments stay what they are, and a process that gets them has to have MISA."""
    args = parse("--misa-active-heads 4")
    for copied in (
        copy.copy(args),
        copy.deepcopy(args),
        replaced(args, misa_router="pooled", misa_block_size=128),
    ):
        assert type(copied) is type(args) and isinstance(copied, ServerArgs)
        assert module.misa_config(copied).active_heads == 4
    monkeypatch.setattr(process, "requires_misa", False)
    assert pickle.loads(pickle.dumps(args)) == args
    assert process.requires_misa
    off = replaced(args, enable_misa=False)
    assert module.misa_config(off) is None
    on = replaced(off, enable_misa=True)
    assert module.misa_config(on) == module.misa_config(args)


def test_with_the_class_of_another_plugin(parse):
    values = given(parse("--misa-active-heads 4"))
    args = module.with_misa(OtherArgs)(**values, enable_misa=True, other=5)
    RELEASE.resolve(args)
    args = pickle.loads(pickle.dumps(args))
    assert isinstance(args, OtherArgs) and args.other == 5
    assert module.misa_config(args) == DEFAULTS


def test_a_program_that_makes_its_own_arguments(parse):
    """As `Engine` does, by keyword; without `enable_misa` what else MISA takes means nothing."""
    from sglang.srt.entrypoints.engine import Engine

    values, make = given(parse()), Engine.server_args_class
    args = make(**values, enable_misa=True, misa_active_heads=4)
    assert module.misa_config(args) == dataclasses.replace(DEFAULTS, active_heads=4)
    for more in ({}, {"enable_misa": False}, {"misa_active_heads": 4}):
        assert type(make(**values, **more)) is ServerArgs


def test_yaml_config(parse, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("misa-active-heads: 4\nmisa-rerank-candidates: 512\n")
    args = parse(f"--config {config}")
    assert args.misa_active_heads == 4
    assert args.misa_rerank_candidates == 512


def run(*command, **variables):
    env = server_env() | variables
    return subprocess.run(command, env=env, capture_output=True, text=True)


SERVE = "from sglang.cli.main import main; main()"


@pytest.mark.parametrize(
    "entry", [["-m", "sglang.launch_server", "--model-path"], ["-c", SERVE, "serve"]]
)
def test_the_launchers_refuse(entry, model):
    from sglang_cpu_engine.launch import FLAGS

    result = run(
        *(sys.executable, *entry, model, *FLAGS),
        *("--enable-misa", "--misa-active-heads", "65"),
    )
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "--misa-active-heads 65 is not between 1 and 64" in last


def test_help_lists_the_arguments(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    listed = capsys.readouterr().out
    for flag in (
        "--enable-misa",
        "--misa-router",
        "--misa-active-heads",
        "--misa-block-size",
        "--misa-rerank-candidates",
        "--misa-min-context",
        "--misa-decode",
        "--misa-audit-interval",
    ):
        assert flag in listed


ENGINE = """
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path={model!r}, enable_misa=True, misa_active_heads=4, misa_router="pooled", device="cpu", attention_backend="dsa",
        dsa_topk_backend="torch", dsa_prefill_backend="flashmla_sparse", dsa_decode_backend="flashmla_sparse",
        kv_cache_dtype="bfloat16", max_total_tokens=4096, mem_fraction_static=0.3, grammar_backend="none",
        disable_cuda_graph=True, sampling_backend="pytorch", log_level="info",
    )
    answer = engine.generate(input_ids=[1] * 600, sampling_params=dict(max_new_tokens=3, ignore_eos=True))
    info = engine.get_server_info()
    print("ENGINE", len(answer["output_ids"]), info["misa_active_heads"], info["misa"]["pooled_keys_bytes"])
    engine.shutdown()
"""


def test_engine(model, tmp_path):
    """A program whose processes are spawned, as on a GPU."""
    from sglang_cpu_engine.launch import SPAWNS

    script = tmp_path / "engine.py"
    script.write_text(ENGINE.format(model=model))
    result = run(sys.executable, str(script), **SPAWNS)
    # 4096 tokens and SGLang's page of padding, 2 layers, 4 bytes a token.
    assert f"ENGINE 3 4 {(4096 + 64) * 2 * 4}" in result.stdout, result.stderr[-3000:]
