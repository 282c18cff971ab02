"""The plug-in in FastDeploy's own processes: its tests, its configuration and runner classes, other versions of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("paddle")

from tests.integrations.fastdeploy_rig import shims
from tests.kit.goldens import REPOSITORY, GoldenCase

GIB = 1 << 30
V32 = REPOSITORY / "tests" / "configs" / "deepseek_v32.json"

TREES = [Path(tree) for tree in os.environ.get("FASTDEPLOY_TREES", "").split(os.pathsep) if tree]
"""Further source trees, other versions: each is asked in a process of its own."""

OURS = """
import sys
from tests.integrations.fastdeploy_rig import shims
shims.apply()
from fastdeploy.cache_manager.v1 import cache_controller
from fastdeploy_dsa.integrations.fastdeploy.cache_controller import FastDeployCacheController
cache_controller.CacheController = FastDeployCacheController
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""

TOLD = """
import logging
from tests.integrations.fastdeploy_rig import shims
shims.apply()
from fastdeploy_dsa.integrations.fastdeploy.installing import install
install()
print(logging.getLevelName(logging.getLogger("fastdeploy_dsa.config").getEffectiveLevel()))
"""


def fastdeploy_root() -> Path:
    from fastdeploy_dsa.integrations.fastdeploy.capabilities import fastdeploy_folder

    return fastdeploy_folder().parent


def on(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """What Paddle says where a process runs on this device."""
    import paddle

    monkeypatch.setattr(paddle.device, "get_device", lambda: device)


def v32_folder(folder: Path) -> Path:
    (folder / "config.json").write_text(V32.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.mark.needs_fastdeploy
@pytest.mark.needs_cache_controller
def test_fastdeploys_own_controller_tests_pass_with_the_plugins_controller(tmp_path: Path) -> None:
    tests = fastdeploy_root() / "tests"
    chosen = tests / os.environ.get("FASTDEPLOY_TESTS", "cache_manager/v1/test_cache_controller.py")
    if not chosen.exists():
        pytest.skip(f"this FastDeploy comes without {chosen.relative_to(tests)}")
    ran = subprocess.run(
        [sys.executable, "-c", OURS, "-q", "-p", "no:cacheprovider", f"--rootdir={tests}", str(chosen)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), str(REPOSITORY)])},
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    print(ran.stdout.strip().splitlines()[-1])


@pytest.mark.needs_fastdeploy
class TestChoice:
    def test_both_backends_and_the_models_are_the_plugins(self) -> None:
        shims.apply()
        from fastdeploy.model_executor.layers.attention import attention_selecter
        from fastdeploy.model_executor.layers.attention.dsa_attention_backend import DSAAttentionBackend
        from fastdeploy.model_executor.layers.attention.mla_attention_backend import MLAAttentionBackend
        from fastdeploy.model_executor.models.model_base import ModelRegistry

        chosen = {name: attention_selecter._get_attn_backend(name) for name in ("DSA_ATTN", "MLA_ATTN")}
        assert issubclass(chosen["DSA_ATTN"], DSAAttentionBackend)
        assert issubclass(chosen["MLA_ATTN"], MLAAttentionBackend)
        classes = [*chosen.values(), *map(ModelRegistry.get_class, ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"))]
        assert {kind.__module__.rsplit(".", 1)[0] for kind in classes} == {"fastdeploy_dsa.integrations.fastdeploy"}
        assert ModelRegistry.get_class("DeepseekV3ForCausalLM").__module__.startswith("fastdeploy.")

    def test_what_the_package_tells_is_in_the_log_of_what_is_served(self) -> None:
        ran = subprocess.run([sys.executable, "-c", TOLD], capture_output=True, text=True, timeout=600, check=True)
        assert ran.stdout.splitlines()[-1] == "INFO"

    @pytest.mark.needs_cache_controller
    def test_the_runner_is_the_plugins_and_finds_its_controller(self) -> None:
        shims.apply()
        from fastdeploy.worker import gpu_model_runner

        from fastdeploy_dsa.integrations.fastdeploy.plugin import runner_class

        runner = runner_class()
        assert issubclass(runner, gpu_model_runner.GPUModelRunner)
        assert gpu_model_runner.CacheController.__name__ == "FastDeployCacheController"

    def test_backend_owned_caches_are_seen_and_stay_the_plugins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Versions in which backends create their caches have the method on the base class."""
        shims.apply()
        from fastdeploy.model_executor.layers.attention.base_attention_backend import AttentionBackend

        from fastdeploy_dsa.integrations.fastdeploy.capabilities import find_capabilities
        from tests.integrations.fastdeploy_rig.controllers import dsa_backend

        monkeypatch.delattr(AttentionBackend, "create_kv_cache", raising=False)
        assert not find_capabilities().has_owned_caches
        monkeypatch.setattr(AttentionBackend, "create_kv_cache", lambda *_, **__: {}, raising=False)
        assert find_capabilities().has_owned_caches
        assert len(dsa_backend().create_kv_cache(num_layers=2, num_blocks=5)) == 4

    def test_dense_latent_attention_is_made_by_fastdeploys_constructor(self, yarn: GoldenCase) -> None:
        from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
        from fastdeploy_dsa.integrations.fastdeploy.mla_backend import FastDeployMLABackend
        from tests.integrations.fastdeploy_rig.rig import make_config

        config = make_config(yarn.folder)
        config.model_config.rope_scaling = None  # which earlier versions read without asking
        backend = FastDeployMLABackend(config, kv_num_heads=1, num_heads=4, head_dim=64)
        assert backend.get_kv_cache_shape(max_num_blocks=2) == ([2, 1, 16, 576], [])
        config.quant_config = SimpleNamespace(kv_cache_quant_type="block_wise_fp8")
        with pytest.raises(PluginError, match="MLA_ATTN and kv_cache_quant_type block_wise_fp8"):
            FastDeployMLABackend(config, kv_num_heads=1, num_heads=4, head_dim=64)

    def test_a_sparse_model_with_another_backend_is_refused(
        self, yarn: GoldenCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
        from tests.integrations.fastdeploy_rig.rig import build_model, make_config

        config = make_config(yarn.folder)
        monkeypatch.setenv("FD_ATTENTION_BACKEND", "APPEND_ATTN")
        with pytest.raises(PluginError, match="needs FD_ATTENTION_BACKEND=DSA_ATTN, got APPEND_ATTN"):
            build_model(config)


@pytest.mark.needs_fastdeploy
class TestSizes:
    def cache_config(self, folder: Path, **args: Any) -> Any:
        shims.apply()
        from fastdeploy import config

        model = config.ModelConfig({"model": str(v32_folder(folder))})
        return config.CacheConfig({"model_cfg": model, "block_size": 64, **args})

    @pytest.mark.needs_cache_controller
    def test_swap_space_holds_as_many_blocks_as_its_bytes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By FastDeploy's formula it would hold 36 times fewer."""
        on(monkeypatch, "gpu:0")
        cache = self.cache_config(tmp_path, swap_space=2.0)
        assert cache.bytes_per_block == 3_076_352
        assert cache.num_cpu_blocks == 2 * GIB // 3_076_352

    @pytest.mark.needs_cache_controller
    def test_a_draft_models_layer_has_its_place_on_the_host(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on(monkeypatch, "gpu:0")
        cache = self.cache_config(tmp_path, swap_space=2.0, speculative_config={"method": "mtp"})
        assert cache.num_cpu_blocks == 2 * GIB // (64 * 62 * 788)

    @pytest.mark.needs_cache_controller
    @pytest.mark.parametrize(
        ("device", "given", "token_bytes"),
        [
            ("cpu", None, 2304 + 512),
            ("gpu:1", None, 656 + 132),
            ("cpu", "fp8", 656 + 132),
            ("gpu:0", "bfloat16", 1408),
        ],
    )
    def test_the_host_blocks_have_the_format_that_the_backend_takes_on_the_device(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, given: str | None, token_bytes: int
    ) -> None:
        on(monkeypatch, device)
        if given is not None:
            monkeypatch.setenv("FD_DSA_CONFIG", json.dumps({"cache_format": given}))
        assert self.cache_config(tmp_path, swap_space=2.0).bytes_per_block == 64 * 61 * token_bytes

    @pytest.mark.needs_cache_controller
    def test_the_configuration_counts_the_bytes_of_the_backends_blocks(self, yarn: GoldenCase) -> None:
        from tests.integrations.fastdeploy_rig.rig import make_backend, make_config

        config = make_config(yarn.folder)
        num_layers = config.model_config.num_hidden_layers
        assert config.cache_config.bytes_per_block == make_backend(config).bytes_per_block(num_layers)

    @pytest.mark.needs_cache_controller
    def test_a_number_that_the_engine_passes_on_stays(self, tmp_path: Path) -> None:
        assert self.cache_config(tmp_path, swap_space=2.0, num_cpu_blocks=17).num_cpu_blocks == 17

    def test_a_host_cache_without_the_v1_manager_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError

        monkeypatch.setenv("ENABLE_V1_KVCACHE_MANAGER", "0")
        with pytest.raises(PluginError, match="--swap-space with DSA_ATTN needs ENABLE_V1_KVCACHE_MANAGER=1"):
            self.cache_config(tmp_path, swap_space=2.0)

    def test_dense_latent_attention_counts_its_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FD_ATTENTION_BACKEND", "MLA_ATTN")
        content = json.loads((V32.parent / "deepseek_v3.json").read_text(encoding="utf-8"))
        monkeypatch.setattr(sys.modules[__name__], "V32", tmp_path / "v3.json")
        (tmp_path / "v3.json").write_text(json.dumps(content), encoding="utf-8")
        assert self.cache_config(tmp_path).bytes_per_block == 4_497_408

    def test_a_backend_that_does_not_fit_the_model_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError

        monkeypatch.setenv("FD_ATTENTION_BACKEND", "MLA_ATTN")
        with pytest.raises(PluginError, match="MLA_ATTN does not fit DeepseekV32ForCausalLM"):
            self.cache_config(tmp_path)


@pytest.mark.needs_fastdeploy
@pytest.mark.needs_cache_controller
class TestRunner:
    """FastDeploy's runner without its constructor, which needs a GPU."""

    def runner(self, yarn: GoldenCase, *, method: str | None = None, ratio: float = 1.0) -> Any:
        from fastdeploy_dsa.integrations.fastdeploy.plugin import runner_class
        from tests.integrations.fastdeploy_rig.rig import make_backend, make_config, make_controller

        kind = runner_class()
        runner = kind.__new__(kind)
        config = make_config(yarn.folder, num_cpu_blocks=3)
        runner.attn_backends = [make_backend(config)]
        runner.cache_controller = make_controller(config)
        runner.fd_config, runner.num_gpu_blocks, runner.share_inputs = config, 6, {}
        runner.enable_cache_manager_v1 = True
        runner.spec_method = None
        runner.speculative_config = SimpleNamespace(method=method, num_gpu_block_expand_ratio=ratio)
        return runner

    def test_a_block_takes_what_the_allocated_tensors_take(self, yarn: GoldenCase) -> None:
        runner = self.runner(yarn)
        runner.initialize_kv_cache()
        taken = sum(tensor.numel().item() * tensor.element_size() for tensor in runner.share_inputs["caches"])
        assert runner.cal_theortical_kvcache() == taken // 6

    def test_a_draft_layer_counts_by_its_ratio(self, yarn: GoldenCase) -> None:
        """FastDeploy adds the ratio as if it were a number of layers."""
        runner = self.runner(yarn, method="mtp", ratio=2.0)
        backend = runner.attn_backends[0]
        per_layer = backend.bytes_per_block(1, layer_offset=3)
        assert runner.cal_theortical_kvcache() == backend.bytes_per_block(3) + 2 * per_layer

    def test_fastdeploys_own_allocation_gives_every_layer_every_role(self, yarn: GoldenCase) -> None:
        runner = self.runner(yarn)
        runner.attn_backends[0].served = copy(runner.attn_backends[0].served)
        runner.enable_cache_manager_v1 = False
        shapes = [shape for shape in runner.attn_backends[0].get_kv_cache_shape(max_num_blocks=1) if shape]
        numbers = sum(shape[-1] * shape[-2] for shape in shapes)
        assert runner.cal_theortical_kvcache() == 3 * numbers * 4

    def test_the_host_tier_is_made_with_the_final_caches_alone(self, yarn: GoldenCase) -> None:
        runner = self.runner(yarn)
        runner.initialize_kv_cache(profile=True)
        assert runner.cache_controller.get_host_cache_kvs_map() == {}
        runner.cache_controller.free_gpu_cache()
        runner.initialize_kv_cache()
        assert len(runner.cache_controller.get_host_cache_kvs_map()) == 6
        assert runner.cache_controller.owned.num_host_blocks == 3

    def test_a_captured_step_waits_for_all_loads_and_checks_the_addresses(
        self, yarn: GoldenCase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastdeploy.worker import gpu_model_runner

        from cache_manager import CacheMoved

        runner = self.runner(yarn)
        runner.initialize_kv_cache()
        waited: list[str] = []
        counter = SimpleNamespace(wait_all=lambda: waited.append("all"))

        def begin(self: Any, captured: bool = True) -> None:
            self.forward_meta = SimpleNamespace(step_use_cudagraph=captured, layer_done_counter=counter)

        monkeypatch.setattr(gpu_model_runner.GPUModelRunner, "initialize_forward_meta", begin)
        monkeypatch.setattr(gpu_model_runner.GPUModelRunner, "capture_model", lambda self: None)
        runner.initialize_forward_meta(False)
        assert waited == []
        runner.capture_model()
        runner.initialize_forward_meta(True)
        assert waited == ["all"]
        runner.cache_controller.free_gpu_cache()
        runner.initialize_kv_cache()
        with pytest.raises(CacheMoved):
            runner.initialize_forward_meta(True)
        runner.capture_model()
        runner.initialize_forward_meta(True)


@pytest.mark.skipif(not TREES, reason="FASTDEPLOY_TREES names no further source trees")
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
def test_every_tree_is_either_served_with_or_refused_with_a_reason(tree: Path, tmp_path: Path) -> None:
    has_sparse_attention = (
        tree / "fastdeploy" / "model_executor" / "layers" / "attention" / "dsa_attention_backend.py"
    ).is_file()
    ran = subprocess.run(
        [sys.executable, "-m", "fastdeploy_dsa.integrations.fastdeploy"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tree), str(REPOSITORY)]),
            "FD_PLUGINS": "fastdeploy_dsa",
            "FD_ATTENTION_BACKEND": "DSA_ATTN",
            "FD_LOG_DIR": str(tmp_path),
        },
    )
    print(ran.stdout)
    if has_sparse_attention:
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert "FastDeployDSABackend" in ran.stdout
    else:
        assert ran.returncode == 1
        assert "cannot be served with: " in ran.stderr
