// SPDX-License-Identifier: Apache-2.0

package criurpc

import (
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

// Failure is the answer to a request of that type that failed, with what CRIU's own
// answers of that type have (send_criu_*_resp in criu/cr-service.c).
func Failure(kind rpc.CriuReqType, errno syscall.Errno, why string) *rpc.CriuResp {
	resp := &rpc.CriuResp{
		Type:     kind.Enum(),
		Success:  proto.Bool(false),
		CrErrno:  proto.Int32(int32(errno)),
		CrErrmsg: proto.String(why),
	}
	switch kind {
	case rpc.CriuReqType_DUMP:
		resp.Dump = &rpc.CriuDumpResp{Restored: proto.Bool(false)}
	case rpc.CriuReqType_RESTORE:
		resp.Restore = &rpc.CriuRestoreResp{Pid: proto.Int32(-1)}
	case rpc.CriuReqType_PAGE_SERVER_CHLD:
		resp.Type = rpc.CriuReqType_PAGE_SERVER.Enum()
	}
	return resp
}
