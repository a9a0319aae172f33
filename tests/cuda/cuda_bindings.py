"""A stand-in for `cuda.bindings.driver` that records calls and executes streams late."""

import ctypes
import threading
import types
from collections import defaultdict, deque

import numpy as np

from tests.cuda.ptx.interpreter import Device as Interpreter

OURS = 1000  # handle of the device's primary context


class Bindings(types.ModuleType):
    """The functions of `cuda.bindings.driver` that the project calls, on the interpreter's memory and launches.

    A stream executes its work only when it is synchronised, so code that relies on an order that it did not request
    fails.
    """

    def __init__(self):
        super().__init__("driver")
        self.device = Interpreter()
        self.calls = []
        self.full = False
        self.CUresult = types.SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2, CUDA_ERROR_UNSUPPORTED_PTX_VERSION=222)
        self.is_old = False
        self.CUdevice_attribute = types.SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="processors",
        )
        self.CUmemPool_attribute = types.SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD="threshold")
        self.CUevent_flags = types.SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
        self.cuuint64_t = int
        self.modules = {}
        self.events = 0  # events that were created and not destroyed
        self.made_on = {}  # the stream of each allocation
        self.streams = defaultdict(deque)  # pending work of each stream
        self.contexts = threading.local()  # a stack of contexts for each thread

    def __getattr__(self, name):
        simple = {
            "cuInit": (),
            "cuDeviceGetCount": (1,),
            "cuDeviceGet": (0,),
            "cuDevicePrimaryCtxRetain": (OURS,),
            "cuDeviceGetName": (b"a device\0\0",),
            "cuDeviceGetDefaultMemPool": ("pool",),
            "cuMemPoolSetAttribute": (),
            "cuGetErrorName": (b"CUDA_ERROR_OF_SOME_KIND",),
        }[name]
        return lambda *args: (self.calls.append(name), (0, *simple))[1]

    def cuDeviceGetAttribute(self, which, device):
        return 0, {"major": 7, "minor": 5, "processors": 3}[which]

    # Contexts.

    def cuCtxGetCurrent(self):
        return 0, (getattr(self.contexts, "stack", None) or [0])[-1]

    def cuCtxPushCurrent(self, context):
        self.contexts.stack = [*getattr(self.contexts, "stack", []), context]
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self.contexts.stack.pop()

    # Streams.

    def later(self, stream, work):
        if self.cuCtxGetCurrent()[1] != OURS:
            return (201,)  # CUDA_ERROR_INVALID_CONTEXT
        self.streams[stream].append(work)
        return (0,)

    def cuStreamSynchronize(self, stream):
        while self.streams[stream]:
            self.streams[stream].popleft()()
        return (0,)

    def cuCtxSynchronize(self):
        self.calls.append("cuCtxSynchronize")
        for stream in list(self.streams):
            self.cuStreamSynchronize(stream)
        return (0,)

    def cuEventCreate(self, flags):
        self.events += 1
        return 0, {}

    def cuEventDestroy(self, event):
        self.events -= 1
        return (0,)

    def cuEventRecord(self, event, stream):
        event["work"], event["stream"] = lambda: None, stream
        return self.later(stream, event["work"])

    def cuStreamWaitEvent(self, stream, event, flags):
        self.calls.append((event["stream"], stream))

        def wait():
            while event["work"] in self.streams[event["stream"]]:
                self.streams[event["stream"]].popleft()()

        return self.later(stream, wait)

    # Memory.

    def cuMemAllocAsync(self, nbytes, stream):
        if self.full:
            return 2, None
        pointer = self.device.alloc(nbytes)
        self.made_on[pointer] = stream
        return 0, pointer

    def cuMemFreeAsync(self, pointer, stream):
        return self.later(stream, lambda: self.device.free(pointer))

    def cuMemcpyHtoDAsync(self, pointer, host, nbytes, stream):
        return self.later(
            stream, lambda: self.device.write(pointer, np.frombuffer(ctypes.string_at(host, nbytes), np.uint8))
        )

    def cuMemcpyDtoHAsync(self, host, pointer, nbytes, stream):
        return self.later(
            stream,
            lambda: ctypes.memmove(host, self.device.read(pointer, (nbytes,), np.uint8).tobytes(), nbytes),
        )

    def cuMemcpyDtoDAsync(self, to, source, nbytes, stream):
        return self.later(stream, lambda: self.device.write(to, self.device.read(source, (nbytes,), np.uint8)))

    # Programs.

    def cuModuleLoadData(self, image):
        if self.is_old and image.startswith(b"//"):
            return 222, None
        assert image.endswith(b"\0")
        self.calls.append("load")
        self.modules[len(self.modules)] = image[:-1].decode()
        return 0, len(self.modules) - 1

    def cuModuleGetFunction(self, module, name):
        return 0, (self.modules[module], name.decode())

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, params, extra):
        ptx, name = function
        sizes = [line.split()[1] for line in ptx.split(".entry")[1].split("{")[0].splitlines() if ".param" in line]
        addresses = (ctypes.c_uint64 * len(sizes)).from_address(params)
        kinds = {".u64": "u8", ".u32": "u4", ".f32": "f4", ".f64": "f8", ".u8": "u1"}
        args = [
            np.frombuffer(ctypes.string_at(at, int(kinds[s][1])), kinds[s])[0]
            for at, s in zip(addresses, sizes, strict=True)
        ]
        return self.later(stream, lambda: self.device.launch(ptx, (gx, gy, gz), (bx, by, bz), args, name=name))
