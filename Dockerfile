# Training on NVIDIA GPUs: docker build -t tokenformer . (configs/clusters/README.md has Apptainer and pyxis as well).
# The wheels of torch bring CUDA with them; the host has the driver. The compiler is for Triton and
# torch.compile, ibverbs-providers for NCCL over InfiniBand.
FROM python:3.12-slim-bookworm

RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc g++ libc6-dev ibverbs-providers make git openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/*

# An editable install needs no sources yet, so that a change of them leaves this layer as it is.
WORKDIR /opt/tokenformer
COPY pyproject.toml ./
COPY requirements requirements
RUN python -m pip install --no-cache-dir -e '.[hf,monitor,remote]' -c requirements/constraints.txt
COPY . .

# Any other user works too (docker run --user, Apptainer, pyxis): what runs write goes to mounted folders and to HOME.
RUN useradd --create-home --uid 1000 trainer && install --directory --owner=trainer --mode=1777 runs
USER trainer
ENTRYPOINT ["python", "deepy.py"]
