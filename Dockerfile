# Training on NVIDIA GPUs. The wheels of torch bring CUDA with them; no compiler is needed.
FROM python:3.12-slim-bookworm

RUN apt-get update \
 && apt-get install --yes --no-install-recommends make git openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/*

# An editable install needs no sources yet, so that a change of them leaves this layer as it is.
WORKDIR /opt/tokenformer
COPY pyproject.toml ./
COPY requirements requirements
RUN python -m pip install --no-cache-dir -e '.[monitor]' -c requirements/constraints.txt
COPY . .
ENTRYPOINT ["python", "deepy.py"]
