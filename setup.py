"""What pyproject.toml cannot say: `configs/` of the repository is installed as `faithdiff_jax/configs`."""

from setuptools import find_packages, setup

setup(
    include_package_data=False,
    packages=[*find_packages(include=["faithdiff_jax*"]), "faithdiff_jax.configs"],
    package_dir={"faithdiff_jax.configs": "configs"},
    package_data={
        "faithdiff_jax": [
            "py.typed",
            "small_model/**/*",
            "evaluation/metrics/parameters/*",
            "evaluation/page/*",
        ],
        "faithdiff_jax.configs": ["**/*"],
    },
)
