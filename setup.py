"Package metadata: everything stands in settings.ini."

import re
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

extras = {}
for line in cfg["extras"].splitlines():
    name, needs = line.split(":", 1)
    extras[name.strip()] = shlex.split(needs)
extras["dev"] = sorted({need for name in ("test", "lab") for need in extras[name]})

# What a clone has beside the package, and a wheel inside it: dinolab.core.shipped finds both.
shipped = {
    "dinolab._data.experiments": "nbs/experiments",
    "dinolab._data.configs": "nbs/experiments/configs",
    "dinolab._data.launch": "nbs/experiments/launch",
    "dinolab._data.manifests": "data_manifests",
}


def long_description():
    "The README; its links lead into the repository, for readers elsewhere."
    text = (root / "README.md").read_text(encoding="utf-8")
    web = f"{cfg['git_url']}/blob/{cfg['branch']}/"
    raw = cfg["git_url"].replace("github.com", "raw.githubusercontent.com") + f"/{cfg['branch']}/"
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:)", rf"\1{raw}", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!\w+:|#)", rf"\1{web}", text)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": cfg["git_url"]},
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=[*find_packages(include=["dinolab*"], exclude=["dinolab.site*"]), *shipped],
    package_dir={"": ".", **shipped},
    package_data={
        "dinolab": ["py.typed"],
        "dinolab.dwi": ["*.safetensors"],
        "dinolab._data.experiments": ["*.ipynb"],
        "dinolab._data.configs": ["*.yaml"],
        "dinolab._data.launch": ["*"],
        "dinolab._data.manifests": ["*.yaml"],
    },
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
