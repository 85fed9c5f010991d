"""How many bytes a namespace may have, by the flag or by the file."""

from storage.config import StorageConfig
from storage.runtime import bytes_quota


def test_the_flag_holds_where_the_file_says_nothing(tmp_path):
    path = tmp_path / "quotas.json"
    path.write_text('{"namespaces": {"red": {"bytes": "1KiB"}, "blue": {"jobs": 1}}}')
    quota = bytes_quota(StorageConfig(state=tmp_path, namespace_bytes=7, quotas=path))
    assert [quota(name) for name in ("red", "blue", "green")] == [1024, 7, 7]
    path.write_text('{"namespaces": {"red": {"bytes": 0}}}')
    assert quota("red") == 0
    assert bytes_quota(StorageConfig(state=tmp_path, namespace_bytes=7))("red") == 7
