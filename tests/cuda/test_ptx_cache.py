"""PTX that is kept between runs has a checksum: a damaged file is compiled again."""

import pytest
from tinygrad_bn_kernels.cuda import launch

from tests.cuda.ptx.compile import require_compiler


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.999])
def test_damaged_ptx_is_compiled_again(monkeypatch, tmp_path, part):
    require_compiler()
    from tinygrad_bn_kernels.cuda import shim

    compiled = []
    monkeypatch.setattr(launch, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(shim, "compile_ptx", lambda *_: compiled.append(1) or ".visible .entry f()\n{\nret;\n}\n")
    program = launch.Program("f", lambda _: None, (("f4*", "u4"),), (256,), 40, 0, 0, False)
    ptx = [launch._cached_ptx(program, program.signatures[0], (8, 0)) for _ in range(2)]
    assert len(compiled) == 1
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    at = int(part * len(content))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert launch._cached_ptx(program, program.signatures[0], (8, 0)) == ptx[0] == ptx[1]
    assert len(compiled) == 2
    assert path.read_bytes() == content
