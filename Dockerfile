# For machines with NVIDIA GPUs. Never built: docker build -t ce-gppo . && docker run --gpus all --ipc host ce-gppo
# Other commands: docker run --gpus all --ipc host ce-gppo .venv/bin/python -m bench.gpu
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv
WORKDIR /ce-gppo
ENV PYTHONPATH=/ce-gppo
COPY requirements requirements
RUN python3 -m venv .venv && .venv/bin/python -m pip install --no-cache-dir --no-deps -r requirements/cuda.txt
COPY . .
RUN touch .venv/installed-cuda
CMD ["make", "train"]
