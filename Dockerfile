# Training on NVIDIA GPUs. The wheels of torch bring CUDA with them; no compiler is needed.
FROM python:3.12-slim-bookworm

RUN apt-get update \
 && apt-get install --yes --no-install-recommends make git openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/tokenformer
COPY requirements requirements
RUN python -m pip install --no-cache-dir -r requirements/base.txt -r requirements/monitor.txt
COPY . .
ENTRYPOINT ["python", "deepy.py"]
