"""The public names: sorted, all there, and resolved without loading what is not asked for."""

import subprocess
import sys

import pytest

import localmoe


def test_all_names_are_sorted_and_resolve() -> None:
    assert localmoe.__all__ == sorted(localmoe.__all__)
    assert dir(localmoe) == localmoe.__all__
    for name in localmoe.__all__:
        found = getattr(localmoe, name)
        assert callable(found)
        assert (found.__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Bnak"):
        localmoe.Bnak  # noqa: B018


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'sentence_transformers', 'pyarrow', 'sklearn', 'pydantic'}"
    code = f"import sys, localmoe; dir(localmoe); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_build_stays_the_function_after_the_room_of_train_time_was_imported() -> None:
    import localmoe.train.pipeline

    assert localmoe.build is localmoe.train.pipeline.build
    assert callable(localmoe.build)
