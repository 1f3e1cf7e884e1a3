"""Build hook: generates the gRPC stubs of protos/ into pdserve/v1/.

The proto path is the Python path, so no import is rewritten.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        import grpc_tools
        from grpc_tools import protoc

        root = Path(self.root)
        protos = sorted(str(path) for path in (root / "protos" / "pdserve").rglob("*.proto"))
        well_known = Path(grpc_tools.__file__).parent / "_proto"
        code = protoc.main(
            [
                "protoc",
                f"-I{root / 'protos'}",
                f"-I{well_known}",
                f"--python_out={root}",
                f"--pyi_out={root}",
                f"--grpc_python_out={root}",
                *protos,
            ]
        )
        if code != 0:
            raise RuntimeError(f"protoc failed with exit code {code}")
        (root / "pdserve" / "v1" / "__init__.py").write_text("")
